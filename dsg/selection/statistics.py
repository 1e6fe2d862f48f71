"""Sums over feature activations from which features are selected."""

import itertools
import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dsg.errors import UserError
from dsg.lm import (
    TokenBatch,
    check_width,
    encode_texts,
    length_batches,
    padding_for,
    read_activations,
)
from dsg.sae import check_finite

if TYPE_CHECKING:
    from sae_lens import SAE

logger = logging.getLogger(__name__)

Importance = Literal["mean_square", "squared_mean"]

# Bounds the float64 working copy: 64 tokens of 16k features take 8 MiB, which a processor's cache
# still holds; 1024 at once take about four times as long per token.
_TOKENS_AT_ONCE = 64
# A tokenizer's own output takes some hundred bytes per token; this bounds how much there is of it.
_TEXTS_AT_ONCE = 256


class FeatureStatistics:
    """Per-feature sums over the counted tokens of one data set, in float64 on the CPU.

    Only sums and counts are kept, so memory does not depend on the amount of text.

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
        counted = feature_acts[token_mask]  # [tokens, d_sae]
        for chunk in counted.split(_TOKENS_AT_ONCE):
            acts = chunk.double()
            self.sum += acts.sum(0).cpu()
            self.sum_of_squares += acts.square().sum(0).cpu()
            self.num_fired += (chunk > 0).sum(0).cpu()
        self.num_tokens += counted.shape[0]
        if residual is not None:
            for chunk in residual[token_mask].split(_TOKENS_AT_ONCE):
                self.residual_norm_sum += chunk.double().norm(dim=-1).sum().cpu()

    def add(self, other: "FeatureStatistics") -> None:
        """Adds the statistics of more text.

        The last bits of a sum depend on the order of its terms: whoever adds the same parts in the
        same order gets the same statistics.

        Raises:
            UserError: If the numbers of features differ.
        """
        if other.d_sae != self.d_sae:
            raise UserError(
                f"statistics to add must be of the same SAE, got {self.d_sae} and {other.d_sae} "
                "features; collect both with one SAE."
            )
        self.sum += other.sum
        self.sum_of_squares += other.sum_of_squares
        self.num_fired += other.num_fired
        self.num_tokens += other.num_tokens
        self.residual_norm_sum += other.residual_norm_sum

    def to_vector(self) -> Float[Tensor, " n"]:
        """All sums and counts as 3 * d_sae + 2 float64 numbers, exact up to 2^53 tokens."""
        num_tokens = torch.tensor(self.num_tokens, dtype=torch.float64)
        scalars = torch.stack([num_tokens, self.residual_norm_sum])
        return torch.cat([self.sum, self.sum_of_squares, self.num_fired.double(), scalars])

    @classmethod
    def from_vector(cls, vector: Float[Tensor, " n"]) -> "FeatureStatistics":
        """Undoes `to_vector`."""
        d_sae = (len(vector) - 2) // 3
        statistics = cls(d_sae)
        sums = vector.cpu().split([d_sae, d_sae, d_sae, 2])
        statistics.sum, statistics.sum_of_squares, num_fired, scalars = sums
        statistics.num_fired = num_fired.long()
        statistics.num_tokens = int(scalars[0])
        statistics.residual_norm_sum = scalars[1]
        return statistics

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

    Memory does not depend on the number of batches, as long as `batches` does not keep them.

    Args:
        model: The language model, possibly wrapped.
        sae: An SAE of any architecture.
        hook_point: Where the SAE reads.
        batches: The data set.

    Raises:
        UserError: If the SAE does not fit the model, the hook point does not exist, or activations
            there are not finite.
    """
    check_width(model, sae.cfg.d_in)
    statistics = FeatureStatistics(sae.cfg.d_sae)
    for batch in batches:
        # Summed per batch first, as several processes do it.
        statistics.add(batch_statistics(model, sae, hook_point, batch))
    logger.info("collected %d features over %d tokens", statistics.d_sae, statistics.num_tokens)
    return statistics


def batch_statistics(
    model: nn.Module, sae: "SAE[Any]", hook_point: str, batch: TokenBatch
) -> FeatureStatistics:
    """The statistics of one batch; see `collect_statistics`."""
    statistics = FeatureStatistics(sae.cfg.d_sae)
    residual = read_activations(model, hook_point, batch)
    token_mask = batch.token_mask.to(residual.device)
    check_finite(residual, token_mask, hook_point)
    for chunk in residual[token_mask].split(_TOKENS_AT_ONCE):  # [tokens, d_in]
        with torch.no_grad():
            feature_acts = sae.encode(chunk.to(sae.W_dec.device))  # [tokens, d_sae]
        everything = torch.ones(chunk.shape[0], dtype=torch.bool, device=feature_acts.device)
        statistics.update(feature_acts, everything, residual=chunk.to(feature_acts.device))
    return statistics


def corpus_batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    max_length: int | None,
    batch_size: int,
) -> Sequence[TokenBatch]:
    """Tokenizes texts and groups them by length, the same on every rank.

    Args:
        tokenizer: The model's tokenizer.
        texts: One sequence each.
        max_length: Longest sequence to keep, in tokens.
        batch_size: Sequences per batch.

    Returns:
        Right-padded batches, each made when it is asked for; every text once, shortest first.
    """
    return _Batches(tokenizer, compact_sequences(tokenizer, texts, max_length), batch_size)


def compact_sequences(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], max_length: int | None
) -> list[np.ndarray]:
    """What `encode_texts` returns, in 4 bytes a token.

    Args:
        tokenizer: The model's tokenizer.
        texts: One sequence each.
        max_length: Longest sequence to keep, in tokens.
    """
    remaining = iter(texts)
    sequences: list[np.ndarray] = []
    while some := list(itertools.islice(remaining, _TEXTS_AT_ONCE)):
        encoded = encode_texts(tokenizer, some, max_length)
        sequences += [np.array(ids, dtype=np.int32) for ids in encoded]
    return sequences


class _Batches(Sequence[TokenBatch]):
    """Sequences of similar length, padded when asked for."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, sequences: Sequence[np.ndarray], batch_size: int
    ) -> None:
        self._sequences = sequences
        self._places = length_batches([len(ids) for ids in sequences], batch_size)
        self._pad = padding_for(tokenizer)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> TokenBatch: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenBatch]: ...

    def __getitem__(self, index: int | slice) -> TokenBatch | list[TokenBatch]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self._pad([self._sequences[place].tolist() for place in self._places[index]])
