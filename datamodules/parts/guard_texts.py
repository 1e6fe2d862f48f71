"""Loaders over the texts from which a guard is selected, calibrated and checked."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from datamodules.parts.loading import batch_loader
from dsg.errors import UserError
from dsg.guard import GuardSettings
from dsg.lm import length_batches, pad_sequences, padding_id, uncounted_token_ids
from dsg.selection import TextSource, check_texts, compact_sequences, guard_texts


class GuardTexts(TextSource, Protocol):
    """A data module that has texts to make a guard from."""

    tokenizer: Any
    trainer: Any


def selection_loader(data: GuardTexts) -> DataLoader:
    """All texts, one purpose after the other, in the order in which a selection reads them.

    Texts are cut and batched as the settings of the run's guard say (`guard_settings` of the
    module), so that the batches are those of `dsg.build_guard`. In each step all ranks have batches
    of the same purpose, some perhaps an empty one.

    Raises:
        UserError: The run makes no guard, or two purposes share a text.
    """
    settings = getattr(data.trainer.lightning_module, "guard_settings", None)
    if settings is None:
        raise UserError(
            "the task 'select' needs a module that makes a guard, got "
            f"{type(data.trainer.lightning_module).__name__}; use SelectionModule."
        )
    texts = guard_texts(
        data,
        near=settings.method == "dsg_near",
        forget=settings.parts().selection != "ids",
    )
    check_texts(texts)
    pad_id, uncounted_ids = padding_id(data.tokenizer), uncounted_token_ids(data.tokenizer)

    def collate(batches: list[tuple[str, list[int], list[np.ndarray]]]) -> dict[str, Any]:
        [(purpose, ids, rows)] = batches
        tokens = pad_sequences([row.tolist() for row in rows], pad_id, uncounted_ids)
        return {"purpose": purpose, "ids": torch.tensor(ids), "tokens": tokens if ids else None}

    batches = [
        batch for purpose in texts for batch in _rounds(data, purpose, texts[purpose], settings)
    ]
    one_each = [[index] for index in range(len(batches))]
    return batch_loader(batches, one_each, data.trainer, collate, keep_rest=True)


def _rounds(
    data: GuardTexts, purpose: str, texts: Sequence[str], settings: GuardSettings
) -> list[tuple[str, list[int], list[np.ndarray]]]:
    """Batches of similar length, filled up with empty ones until every rank has equally many."""
    sequences = compact_sequences(data.tokenizer, texts, settings.max_length)
    batches = length_batches([len(row) for row in sequences], settings.batch_size)
    batches += [[]] * (-len(batches) % data.trainer.world_size)
    return [(purpose, ids, [sequences[index] for index in ids]) for ids in batches]
