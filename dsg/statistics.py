"""Sums over feature activations from which features are selected."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dsg.errors import UserError
from dsg.hooks import check_width, read_activations
from dsg.tokens import (
    TokenBatch,
    encode_texts,
    length_batches,
    pad_sequences,
    padding_id,
    uncounted_token_ids,
)

if TYPE_CHECKING:
    from sae_lens import SAE

logger = logging.getLogger(__name__)

Importance = Literal["mean_square", "squared_mean"]

# Bounds the float64 working copy: 1024 tokens of 16k features take 128 MiB.
_TOKENS_AT_ONCE = 1024


class FeatureStatistics:
    """Per-feature sums over the counted tokens of one data set, in float64 on the CPU.

    Only sums and counts are kept, so `merge` of two halves equals one pass over both.

    Args:
        d_sae: Number of features.

    Attributes:
        sum: Sum of activations, shape [d_sae].
        sum_of_squares: Sum of squared activations, shape [d_sae].
        num_fired: Tokens on which the feature was active, int64, shape [d_sae].
        num_tokens: Counted tokens.
        residual_norm_sum: Sum of the L2 norms of the residual stream, 0-dim float64.
    """

    def __init__(self, d_sae: int) -> None:
        self.sum = torch.zeros(d_sae, dtype=torch.float64)
        self.sum_of_squares = torch.zeros(d_sae, dtype=torch.float64)
        self.num_fired = torch.zeros(d_sae, dtype=torch.int64)
        self.num_tokens = 0
        self.residual_norm_sum = torch.zeros((), dtype=torch.float64)

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.sum.shape[0]

    def update(
        self,
        feature_acts: Float[Tensor, "*axes d_sae"],
        token_mask: Bool[Tensor, "*axes"],
        residual: Float[Tensor, "*axes d_in"] | None = None,
    ) -> None:
        """Adds the counted tokens of a batch.

        Args:
            feature_acts: Activations, at least 0.
            token_mask: True for counted tokens.
            residual: Hook-point activations, for the mean residual norm.
        """
        counted = feature_acts[token_mask]
        for chunk in counted.split(_TOKENS_AT_ONCE):
            acts = chunk.double()
            self.sum += acts.sum(0).cpu()
            self.sum_of_squares += acts.square().sum(0).cpu()
            self.num_fired += (chunk > 0).sum(0).cpu()
        self.num_tokens += counted.shape[0]
        if residual is not None:
            self.residual_norm_sum += residual[token_mask].double().norm(dim=-1).sum().cpu()

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """The statistics of both data sets together.

        Raises:
            UserError: If the numbers of features differ.
        """
        if other.d_sae != self.d_sae:
            raise UserError(
                f"statistics to merge must be of the same SAE, got {self.d_sae} and {other.d_sae} "
                "features; collect both with one SAE."
            )
        merged = FeatureStatistics(self.d_sae)
        merged.sum = self.sum + other.sum
        merged.sum_of_squares = self.sum_of_squares + other.sum_of_squares
        merged.num_fired = self.num_fired + other.num_fired
        merged.num_tokens = self.num_tokens + other.num_tokens
        merged.residual_norm_sum = self.residual_norm_sum + other.residual_norm_sum
        return merged

    def score(self, importance: Importance = "mean_square") -> Float[Tensor, " d_sae"]:
        """Importance of each feature, at least 0.

        Args:
            importance: `mean_square` is E[z^2], the paper's Fisher proxy; `squared_mean` is
                (E[z])^2, what its released code computes.

        Raises:
            UserError: If no token was counted, or `importance` is unknown.
        """
        num_tokens = self._counted()
        if importance == "mean_square":
            return self.sum_of_squares / num_tokens
        if importance == "squared_mean":
            return (self.sum / num_tokens).square()
        raise UserError(
            f"`importance` must be 'mean_square' or 'squared_mean', got {importance!r}; "
            "choose one of them."
        )

    def frequency(self) -> Float[Tensor, " d_sae"]:
        """Fraction of counted tokens on which each feature is active.

        Raises:
            UserError: If no token was counted.
        """
        return self.num_fired.double() / self._counted()

    def mean_residual_norm(self) -> float:
        """Mean L2 norm of the residual stream over counted tokens.

        Raises:
            UserError: If no token was counted.
        """
        return self.residual_norm_sum.item() / self._counted()

    def _counted(self) -> int:
        if self.num_tokens == 0:
            raise UserError(
                "statistics need at least one counted token, got none; pass texts that hold more "
                "than special tokens."
            )
        return self.num_tokens


def collect_statistics(
    model: nn.Module,
    sae: "SAE[Any]",
    hook_point: str,
    batches: Iterable[TokenBatch],
) -> FeatureStatistics:
    """Runs token batches through the unedited model and sums up all features.

    Args:
        model: The language model, possibly wrapped.
        sae: An SAE of any architecture.
        hook_point: Where the SAE reads.
        batches: The data set.

    Raises:
        UserError: If the SAE does not fit the model or the hook point does not exist.
    """
    check_width(model, sae.cfg.d_in)
    statistics = FeatureStatistics(sae.cfg.d_sae)
    for batch in batches:
        residual = read_activations(model, hook_point, batch)
        counted = residual[batch.token_mask.to(residual.device)]
        for chunk in counted.split(_TOKENS_AT_ONCE):
            with torch.no_grad():
                feature_acts = sae.encode(chunk.to(sae.W_enc.device))
            everything = torch.ones(chunk.shape[0], dtype=torch.bool, device=feature_acts.device)
            statistics.update(feature_acts, everything, residual=chunk.to(feature_acts.device))
    logger.info("collected %d features over %d tokens", statistics.d_sae, statistics.num_tokens)
    return statistics


def corpus_batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    max_length: int | None,
    batch_size: int,
) -> list[TokenBatch]:
    """Tokenizes texts and groups them by length, the same on every rank.

    Args:
        tokenizer: The model's tokenizer.
        texts: One sequence each.
        max_length: Longest sequence to keep, in tokens.
        batch_size: Sequences per batch.

    Returns:
        Right-padded batches; every text once, shortest first.
    """
    sequences = encode_texts(tokenizer, texts, max_length)
    pad_id, uncounted_ids = padding_id(tokenizer), uncounted_token_ids(tokenizer)
    return [
        pad_sequences([sequences[index] for index in indices], pad_id, uncounted_ids)
        for indices in length_batches([len(ids) for ids in sequences], batch_size)
    ]
