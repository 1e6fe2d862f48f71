"""Negative preference optimization (NPO): ascent that slows down as the forget text is forgotten.

Zhang et al., "Negative Preference Optimization: From Catastrophic Collapse to Effective
Unlearning", 2024, Eq. 3.
"""

from typing import ClassVar

import torch.nn.functional as F
from torch import nn

from dsg.lm import Reference, TokenBatch, mean_over_sequences, next_token_logits, sequence_nll
from dsg.objectives.objective import Objective
from dsg.objectives.terms import (
    Loss,
    RetainTerm,
    check_not_negative,
    check_positive,
    check_retain,
    required,
    retain_loss,
    weighted,
)


class NPO(Objective):
    """gamma * mean over sequences of -(2/beta) log sigmoid(-beta log(p / p_ref)) + alpha * retain.

    p is the probability of a whole sequence: its log is *summed* over the targets, so that a given
    beta means less for shorter texts. The retain term is per target. Where the model equals the
    reference the forget term is (2/beta) ln 2; for beta -> 0 its gradient is that of ascent.

    The defaults are the method's own and lie in the grid of the DSG paper's Table 9.

    Args:
        beta: Inverse temperature, > 0.
        alpha: Weight of the retain term, >= 0.
        gamma: Weight of the forget term, >= 0.
        retain: `none`, `nll` or `kl`, see `retain_loss`.

    Raises:
        UserError: `beta` is not positive, a weight is negative, or `retain` is unknown.
    """

    name: ClassVar[str] = "npo"
    needs_reference = True

    def __init__(
        self,
        *,
        beta: float = 0.1,
        alpha: float = 1.0,
        gamma: float = 1.0,
        retain: RetainTerm = "nll",
    ) -> None:
        check_positive(beta=beta)
        check_not_negative(alpha=alpha, gamma=gamma)
        check_retain(retain)
        self.beta = beta
        self.alpha = alpha
        self.gamma = gamma
        self.retain: RetainTerm = retain

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
        original = sequence_nll(required(reference, "NPO").logits(forget), forget)
        current = sequence_nll(next_token_logits(model, forget), forget)
        log_ratio = original.sums - current.sums
        losses = -2 / self.beta * F.logsigmoid(-self.beta * log_ratio)
        forget_loss = mean_over_sequences(losses, current.num_targets)
        kept = retain_loss(self.retain, model, retain, reference)
        return weighted(forget_loss, kept, self.gamma, self.alpha)
