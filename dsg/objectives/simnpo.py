"""Simple NPO (SimNPO): NPO without a reference, on the likelihood per token.

Fan et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning",
2024, Eq. 4.
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
    retain_loss,
    weighted,
)


class SimNPO(Objective):
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

    Raises:
        UserError: `beta` is not positive, a weight or `delta` is negative, or `retain` is
            unknown.
    """

    name: ClassVar[str] = "simnpo"

    def __init__(
        self,
        *,
        beta: float = 4.5,
        delta: float = 0.0,
        alpha: float = 1.0,
        gamma: float = 0.125,
        retain: RetainTerm = "nll",
    ) -> None:
        check_positive(beta=beta)
        check_not_negative(alpha=alpha, gamma=gamma, delta=delta)
        check_retain(retain)
        self.beta = beta
        self.delta = delta
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
        nll = sequence_nll(next_token_logits(model, forget), forget)
        per_token = nll.sums / nll.num_targets.clamp(min=1)
        losses = -2 / self.beta * F.logsigmoid(self.beta * (per_token - self.delta))
        forget_loss = mean_over_sequences(losses, nll.num_targets)
        kept = retain_loss(self.retain, model, retain, reference)
        return weighted(forget_loss, kept, self.gamma, self.alpha)
