"""What all unlearning objectives share: their result, the retain term, and their checks.

An objective is called with the model, a forget and a retain batch and returns a `Loss`. Its weights
are named alike everywhere: `gamma` weighs the forget term, `alpha` the retain term.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsg.errors import UserError
from dsg.lm import Reference, TokenBatch, mean_kl, mean_nll, next_token_logits

RetainTerm = Literal["none", "nll", "kl"]


class Loss(NamedTuple):
    """What is minimised and its two parts before weighting; a part that is not used is 0."""

    total: Float[Tensor, ""]
    forget: Float[Tensor, ""]
    retain: Float[Tensor, ""]


def retain_loss(
    term: RetainTerm, model: nn.Module, batch: TokenBatch, reference: Reference | None
) -> Float[Tensor, ""]:
    """The retain term of a batch.

    Args:
        term: `none` is 0 and runs nothing; `nll` is the negative log-likelihood per target; `kl`
            is KL(reference || model) per target, both in nats.
        model: The model that is trained.
        batch: Retain text.
        reference: Needed for `kl`.

    Raises:
        UserError: `kl` has no reference.
    """
    if term == "none":
        return torch.zeros((), device=batch.input_ids.device)
    logits = next_token_logits(model, batch)
    if term == "nll":
        return mean_nll(logits, batch)
    return mean_kl(required(reference, "the retain term 'kl'").logits(batch), logits, batch)


def weighted(
    forget: Float[Tensor, ""], retain: Float[Tensor, ""], gamma: float, alpha: float
) -> Loss:
    """`gamma * forget + alpha * retain` with its parts."""
    return Loss(gamma * forget + alpha * retain, forget, retain)


def check_positive(**values: float) -> None:
    """Refuses numbers that are not positive and finite.

    Raises:
        UserError: If one is not; it is named after its keyword.
    """
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise UserError(f"`{name}` must be positive and finite, got {value}; raise it above 0.")


def check_not_negative(**values: float) -> None:
    """Refuses numbers that are negative or not finite.

    Raises:
        UserError: If one is; it is named after its keyword.
    """
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise UserError(
                f"`{name}` must be at least 0 and finite, got {value}; use 0 for none of it."
            )


def required(reference: Reference | None, what: str) -> Reference:
    """The reference, which must be there.

    Args:
        reference: As it was given.
        what: That needs it.

    Raises:
        UserError: If there is none.
    """
    if reference is None:
        raise UserError(
            f"`reference` must be given for {what}, got None; choose AdapterOff or FrozenCopy."
        )
    return reference
