"""Next-token likelihoods and divergences over counted targets, in float32.

A target is a counted token whose predecessor is a real one; position t-1 predicts it. Padding,
special tokens and the first token of a sequence are never targets.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsg.lm.tokens import TokenBatch


class SequenceNLL(NamedTuple):
    """Negative log-likelihood of each sequence of a batch."""

    sums: Float[Tensor, " batch"]
    """Nats, summed over the sequence's targets; 0 without a target."""
    num_targets: Int[Tensor, " batch"]
    """Targets of the sequence, >= 0."""


def next_token_logits(model: nn.Module, batch: TokenBatch) -> Float[Tensor, "batch seq vocab"]:
    """Logits of a causal LM in its current mode, with gradients."""
    return model(**batch.model_inputs(), use_cache=False).logits


def target_mask(batch: TokenBatch) -> Bool[Tensor, "batch predictions"]:
    """True where the token after a position is a target."""
    # With padding on the left, nothing real predicts a sequence's first token.
    return batch.token_mask[:, 1:] & (batch.attention_mask[:, :-1] != 0)


def token_nll(
    logits: Float[Tensor, "batch seq vocab"], batch: TokenBatch
) -> Float[Tensor, " targets"]:
    """Negative log-probability of each target in nats, row by row."""
    mask = target_mask(batch)
    # Selected first, so that only the targets' logits are copied to float32.
    predictions = logits[:, :-1][mask].float()
    return F.cross_entropy(predictions, batch.input_ids[:, 1:][mask], reduction="none")


def mean_nll(logits: Float[Tensor, "batch seq vocab"], batch: TokenBatch) -> Float[Tensor, ""]:
    """Negative log-likelihood per target in nats, every target of the batch weighing the same."""
    return mean_or_zero(token_nll(logits, batch))


def sequence_nll(logits: Float[Tensor, "batch seq vocab"], batch: TokenBatch) -> SequenceNLL:
    """Negative log-likelihood of each sequence, summed over its targets."""
    mask = target_mask(batch)
    # Scattered back into rows: `index_add` would sum in an undefined order on a GPU.
    per_token = torch.zeros(mask.shape, dtype=torch.float32, device=logits.device)
    per_token = per_token.masked_scatter(mask, token_nll(logits, batch))
    return SequenceNLL(per_token.sum(dim=1), mask.sum(dim=1))


def mean_over_sequences(
    values: Float[Tensor, " batch"], num_targets: Int[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Mean of one value per sequence over the sequences that have a target."""
    return mean_or_zero(values[num_targets > 0])


def mean_kl(
    reference_logits: Float[Tensor, "batch seq vocab"],
    logits: Float[Tensor, "batch seq vocab"],
    batch: TokenBatch,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """KL(reference || model) of the next-token distributions, per target.

    Args:
        reference_logits: Of the distribution that the divergence is measured from.
        logits: Of the model that is trained.
        batch: Says which positions predict a target; the others do not count.
        temperature: Both logits are divided by it, > 0; the result is not rescaled.

    Returns:
        Nats, >= 0 up to rounding, 0 where the logits agree.
    """
    mask = target_mask(batch)
    target, predicted = (
        (either[:, :-1][mask].float() / temperature).log_softmax(dim=-1)
        for either in (reference_logits, logits)
    )
    divergences = F.kl_div(predicted, target, reduction="none", log_target=True).sum(dim=-1)
    return mean_or_zero(divergences)


def mean_or_zero(values: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """The mean, or for no values a zero whose gradient is zero: a batch may hold no target."""
    return values.sum() / max(len(values), 1)
