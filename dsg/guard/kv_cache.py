"""Running state: what the tokens in a KV cache said about their sequences."""

import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dsg.errors import UserError
from dsg.guard.gate import Evidence


@dataclass(frozen=True)
class _Record:
    evidence: list[Evidence]
    num_positions: int
    keys: "weakref.ref[Tensor] | None"


class CacheEvidence:
    """Evidence per KV cache; a new cache begins a new input, and a dead one is forgotten."""

    def __init__(self) -> None:
        self._records: weakref.WeakKeyDictionary[Any, _Record] = weakref.WeakKeyDictionary()

    def remember(self, cache: Any, evidence: list[Evidence], num_positions: int) -> None:
        """Stores what the tokens in a cache, if there is one, said to each guard."""
        if cache is not None:
            keys = _first_keys(cache)
            alias = weakref.ref(keys) if keys is not None else None
            self._records[cache] = _Record(evidence, num_positions, alias)

    def repeat(self, cache: Any, repeats: int) -> None:
        """Repeats each row of a cache, the copies in adjacent rows, and what is known about it.

        Raises:
            UserError: If the cache was filled elsewhere.
        """
        record = self._record(cache)
        cache.batch_repeat_interleave(repeats)
        evidence = [guards.repeat_interleave(repeats) for guards in record.evidence]
        self.remember(cache, evidence, record.num_positions)

    def recall(self, cache: Any, batch: int) -> list[Evidence] | None:
        """What the tokens in a cache said about `batch` sequences; None for an empty one or none.

        Raises:
            UserError: If the cache was filled elsewhere, or its rows are no longer the same.
        """
        past = past_length(cache)
        if past == 0:
            return None
        record = self._record(cache)
        before = record.evidence[0].triggered.shape[0]
        if before != batch:
            raise UserError(
                f"the batch must keep its {before} sequences while a KV cache grows, got {batch}; "
                "start anew with the sequences that remain."
            )
        moved = record.keys is not None and record.keys() is not _first_keys(cache)
        if moved or record.num_positions != past:
            raise UserError(
                "the rows of a KV cache must stay in place while a guard is attached, but they "
                "were moved, trimmed or offloaded; use num_beams=1, no assistant model and a "
                "dynamic cache."
            )
        return record.evidence

    def _record(self, cache: Any) -> _Record:
        record = self._records.get(cache)
        if record is None:
            raise UserError(
                "`past_key_values` must be filled while the guard is attached, got "
                f"{past_length(cache)} tokens that it has not seen; run the prompt inside the "
                "`with` block."
            )
        return record


def past_length(cache: Any) -> int:
    """Positions that a KV cache holds; 0 for None."""
    return int(cache.get_seq_length()) if cache is not None else 0


def _first_keys(cache: Any) -> Tensor | None:
    """The first key tensor of a cache: beam search, trimming and selecting rows replace it."""
    layers = cache.layers if isinstance(cache, Cache) else ()
    keys = (layer.keys for layer in layers if isinstance(layer, CacheLayerMixin))
    return next((tensor for tensor in keys if tensor is not None), None)
