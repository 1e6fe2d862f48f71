"""Gradient difference (GradDiff): ascent on forget text, descent or a leash on retain text.

Liu et al., "Continual Learning and Private Unlearning", 2022; with KL: Maini et al., "TOFU", 2024.
"""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from dsg.lm import Reference, TokenBatch, mean_nll, next_token_logits
from dsg.objectives.objective import WeightedObjective


class GradDiff(WeightedObjective):
    """gamma * -NLL(forget) + alpha * retain term, each per target of its batch.

    The defaults are those of the published GradDiff, and lie in the grid of the DSG paper's
    Table 8, where this is called GA and `alpha` beta. With `gamma` 0 it is plain fine-tuning on
    retain text, with `retain` `none` gradient ascent times gamma.
    """

    name: ClassVar[str] = "grad_diff"

    def forget_term(
        self, model: nn.Module, forget: TokenBatch, reference: Reference | None
    ) -> Float[Tensor, ""]:
        """The log-likelihood of a forget batch."""
        del reference
        return -mean_nll(next_token_logits(model, forget), forget)
