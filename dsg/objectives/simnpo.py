"""Simple NPO (SimNPO): NPO without a reference, on the likelihood per token.

Fan et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning",
2024, Eq. 4.
"""

from typing import ClassVar

import torch.nn.functional as F
from torch import nn

from dsg.objectives.likelihood import mean_over_sequences, next_token_logits, sequence_nll
from dsg.objectives.terms import (
    Loss,
    RetainTerm,
    check_not_negative,
    check_positive,
    check_retain,
    retain_loss,
    weighted,
)
from dsg.reference import Reference
from dsg.tokens import TokenBatch


class SimNPO:
    """gamma * mean of -(2/beta) log sigmoid(beta (NLL / length - delta)) + alpha * retain term.

    The mean is over sequences. NLL is summed over the targets of a sequence and divided by their
    number, so that long and short texts weigh the same. The paper writes its margin outside of
    beta: gamma_paper = beta * delta.

    The defaults are the paper's for TOFU forget10 (forget05: beta 2.5, gamma 0.1375). The DSG
    paper gives no grid, only epochs (Table 11).

    Args:
        beta: Inverse temperature, > 0.
        delta: Margin in nats per token, finite; a larger one forgets more.
        alpha: Weight of the retain term, >= 0.
        gamma: Weight of the forget term, >= 0.
        retain: `none`, `nll` or `kl`, see `retain_loss`.
        reference: Needed for `kl`.

    Raises:
        UserError: `beta` is not positive, a weight or `delta` is negative, `retain` is unknown, or
            `kl` has no reference.
    """

    needs_reference: ClassVar[bool] = False

    def __init__(
        self,
        *,
        beta: float = 4.5,
        delta: float = 0.0,
        alpha: float = 1.0,
        gamma: float = 0.125,
        retain: RetainTerm = "nll",
        reference: Reference | None = None,
    ) -> None:
        check_positive(beta=beta)
        check_not_negative(alpha=alpha, gamma=gamma, delta=delta)
        check_retain(retain, reference, "SimNPO")
        self.beta = beta
        self.delta = delta
        self.alpha = alpha
        self.gamma = gamma
        self.retain: RetainTerm = retain
        self.reference = reference

    def __call__(self, model: nn.Module, forget: TokenBatch, retain: TokenBatch) -> Loss:
        """The loss on a forget and a retain batch."""
        nll = sequence_nll(next_token_logits(model, forget), forget)
        per_token = nll.sums / nll.num_targets.clamp(min=1)
        losses = -2 / self.beta * F.logsigmoid(self.beta * (per_token - self.delta))
        forget_loss = mean_over_sequences(losses, nll.num_targets)
        kept = retain_loss(self.retain, model, retain, self.reference)
        return weighted(forget_loss, kept, self.gamma, self.alpha)
