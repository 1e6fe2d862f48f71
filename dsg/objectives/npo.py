"""Negative preference optimization (NPO): ascent that slows down as the forget text is forgotten.

Zhang et al., "Negative Preference Optimization: From Catastrophic Collapse to Effective
Unlearning", 2024, Eq. 3.
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsg.lm import Reference, TokenBatch, mean_over_sequences, next_token_logits, sequence_nll
from dsg.objectives.objective import WeightedObjective
from dsg.objectives.terms import check_positive, required


class NPO(WeightedObjective):
    """gamma * mean over sequences of -(2/beta) log sigmoid(-beta log(p / p_ref)) + alpha * retain.

    p is the probability of a whole sequence: its log is *summed* over the targets, so that a given
    beta means less for shorter texts. The retain term is per target. Where the model equals the
    reference the forget term is (2/beta) ln 2; for beta -> 0 its gradient is that of ascent.

    The defaults are the method's own and lie in the grid of the DSG paper's Table 9.

    Args:
        beta: Inverse temperature, > 0.
        weights: `alpha`, `gamma` and `retain` of `WeightedObjective`.

    Raises:
        UserError: `beta` is not positive, a weight is negative, or `retain` is unknown.
    """

    name: ClassVar[str] = "npo"
    needs_reference = True

    def __init__(self, *, beta: float = 0.1, **weights: Any) -> None:
        super().__init__(**weights)
        check_positive(beta=beta)
        self.beta = beta

    def forget_term(
        self, model: nn.Module, forget: TokenBatch, reference: Reference | None
    ) -> Float[Tensor, ""]:
        """The mean over the sequences of a forget batch."""
        original = sequence_nll(required(reference, "NPO").logits(forget), forget)
        current = sequence_nll(next_token_logits(model, forget), forget)
        log_ratio = original.sums - current.sums
        losses = -2 / self.beta * F.logsigmoid(-self.beta * log_ratio)
        return mean_over_sequences(losses, current.num_targets)
