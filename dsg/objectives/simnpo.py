"""Simple NPO (SimNPO): NPO without a reference, on the likelihood per token.

Fan et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning",
2024, Eq. 4.
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsg.lm import Reference, TokenBatch, mean_over_sequences, next_token_logits, sequence_nll
from dsg.objectives.objective import WeightedObjective
from dsg.objectives.terms import check_not_negative, check_positive


class SimNPO(WeightedObjective):
    """gamma * mean of -(2/beta) log sigmoid(beta (NLL / length - delta)) + alpha * retain term.

    The mean is over sequences. NLL is summed over the targets of a sequence and divided by their
    number, so that long and short texts weigh the same. The paper writes its margin outside of
    beta: gamma_paper = beta * delta.

    The defaults are the paper's for TOFU forget10 (forget05: beta 2.5, gamma 0.1375). The DSG
    paper gives no grid, only epochs (Table 11).

    Args:
        beta: Inverse temperature, > 0.
        delta: Margin in nats per token, finite; a larger one forgets more.
        gamma: Weight of the forget term, >= 0.
        weights: `alpha` and `retain` of `WeightedObjective`.

    Raises:
        UserError: `beta` is not positive, a weight or `delta` is negative, or `retain` is
            unknown.
    """

    name: ClassVar[str] = "simnpo"

    def __init__(
        self, *, beta: float = 4.5, delta: float = 0.0, gamma: float = 0.125, **weights: Any
    ) -> None:
        super().__init__(gamma=gamma, **weights)
        check_positive(beta=beta)
        check_not_negative(delta=delta)
        self.beta = beta
        self.delta = delta

    def forget_term(
        self, model: nn.Module, forget: TokenBatch, reference: Reference | None
    ) -> Float[Tensor, ""]:
        """The mean over the sequences of a forget batch."""
        del reference
        nll = sequence_nll(next_token_logits(model, forget), forget)
        per_token = nll.sums / nll.num_targets.clamp(min=1)
        losses = -2 / self.beta * F.logsigmoid(self.beta * (per_token - self.delta))
        return mean_over_sequences(losses, nll.num_targets)
