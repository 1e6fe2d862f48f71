"""A language model that is a table, and batches for it: every loss can be computed by hand."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from dsg.lm.tokens import TokenBatch, pad_sequences
from tests.helpers import BOS, PAD

# Row i holds the probabilities of the token after token i; ids 0 and 2 are pad and bos.
TABLE = [
    [0.20, 0.20, 0.20, 0.20, 0.20],
    [0.50, 0.25, 0.05, 0.10, 0.10],
    [0.10, 0.20, 0.10, 0.50, 0.10],
    [0.02, 0.60, 0.08, 0.10, 0.20],
    [0.10, 0.40, 0.10, 0.15, 0.25],
]
REFERENCE_TABLE = [
    [0.40, 0.10, 0.10, 0.20, 0.20],
    [0.10, 0.30, 0.20, 0.20, 0.20],
    [0.05, 0.40, 0.05, 0.25, 0.25],
    [0.10, 0.30, 0.20, 0.30, 0.10],
    [0.20, 0.20, 0.20, 0.20, 0.20],
]


class TableModel(nn.Module):
    """Logits of the next token are a row of a table, shifted as logits may be."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log() + 3.0)
        self.attention_masks: list[Tensor] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> object:
        assert not use_cache
        self.attention_masks.append(attention_mask)
        return SimpleNamespace(logits=self.logits[input_ids])


class TableReference:
    """The reference of a `TableModel`."""

    def __init__(self, probabilities: list[list[float]] = REFERENCE_TABLE) -> None:
        self.model = TableModel(probabilities)

    @torch.no_grad()
    def logits(self, batch: TokenBatch) -> Tensor:
        return self.model(**batch.model_inputs(), use_cache=False).logits


def token_batch(*sequences: list[int], side: str = "right") -> TokenBatch:
    return pad_sequences(sequences, PAD, [PAD, BOS], side=side)


def rows(batch: TokenBatch, *indices: int) -> TokenBatch:
    """Some sequences of a batch, as widely padded as the batch."""
    index = torch.tensor(indices)
    return TokenBatch(batch.input_ids[index], batch.attention_mask[index], batch.token_mask[index])


def uncount(batch: TokenBatch, row: int, position: int) -> TokenBatch:
    """The batch with one token fewer that counts."""
    token_mask = batch.token_mask.clone()
    token_mask[row, position] = False
    return replace(batch, token_mask=token_mask)


def hand_nlls(table: list[list[float]], ids: list[int]) -> list[float]:
    """Negative log-probability of each target of one sequence, in plain Python."""
    return [
        -math.log(table[before][token])
        for before, token in itertools.pairwise(ids)
        if token not in (PAD, BOS)
    ]


def hand_kls(
    ids: list[int],
    temperature: float = 1.0,
    first: list[list[float]] = REFERENCE_TABLE,
    second: list[list[float]] = TABLE,
) -> list[float]:
    """KL(first || second) before each target of one sequence, in plain Python."""

    def tempered(row: list[float]) -> list[float]:
        powers = [p ** (1 / temperature) for p in row]
        return [power / sum(powers) for power in powers]

    return [
        sum(
            p * math.log(p / q)
            for p, q in zip(tempered(first[before]), tempered(second[before]), strict=True)
        )
        for before, token in itertools.pairwise(ids)
        if token not in (PAD, BOS)
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
