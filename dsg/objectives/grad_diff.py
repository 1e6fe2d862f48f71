"""Gradient difference (GradDiff): ascent on forget text, descent or a leash on retain text.

Liu et al., "Continual Learning and Private Unlearning", 2022; with KL: Maini et al., "TOFU", 2024.
"""

from typing import ClassVar

from torch import nn

from dsg.lm import Reference, TokenBatch, mean_nll, next_token_logits
from dsg.objectives.objective import Objective
from dsg.objectives.terms import (
    Loss,
    RetainTerm,
    check_not_negative,
    check_retain,
    retain_loss,
    weighted,
)


class GradDiff(Objective):
    """gamma * -NLL(forget) + alpha * retain term, each per target of its batch.

    The defaults are those of the published GradDiff, and lie in the grid of the DSG paper's
    Table 8, where this is called GA and `alpha` beta.

    Args:
        alpha: Weight of the retain term, >= 0.
        gamma: Weight of the forget term, >= 0; 0 is plain fine-tuning on retain text.
        retain: `nll` descends on retain text, `kl` holds its next-token distributions where the
            reference has them, `none` is gradient ascent times gamma.

    Raises:
        UserError: A weight is negative, or `retain` is unknown.
    """

    name: ClassVar[str] = "grad_diff"

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        gamma: float = 1.0,
        retain: RetainTerm = "nll",
    ) -> None:
        check_not_negative(alpha=alpha, gamma=gamma)
        check_retain(retain)
        self.alpha = alpha
        self.gamma = gamma
        self.retain: RetainTerm = retain
        self.needs_reference = retain == "kl"

    def __call__(
        self,
        model: nn.Module,
        forget: TokenBatch,
        retain: TokenBatch,
        *,
        reference: Reference | None = None,
        step: int | None = None,
    ) -> Loss:
        """The loss on a forget and a retain batch."""
        del step
        forget_loss = -mean_nll(next_token_logits(model, forget), forget)
        kept = retain_loss(self.retain, model, retain, reference)
        return weighted(forget_loss, kept, self.gamma, self.alpha)
