"""Loaders of the tiny world's data modules, whose batches are formed before they are dealt."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch.utils.data import DataLoader

from datamodules.parts.loading import batch_loader, passage_loader, question_loader
from datamodules.tiny_world.world import Split
from dsg.evaluation import Passage, Question
from dsg.lm import encode_texts, pad_sequences, padding_id, uncounted_token_ids


class Evaluated(Protocol):
    """A data module whose questions and passages are evaluated."""

    tokenizer: Any
    batch_size: int
    trainer: Any

    def questions(self, split: Split) -> list[Question]:
        """Questions of a half of the facts."""
        ...

    def passages(self, split: Split) -> list[Passage]:
        """Passages of a half of the facts."""
        ...


def evaluation_loaders(data: Evaluated, split: Split) -> list[DataLoader]:
    """Each question and each passage of a half of the facts exactly once."""
    size, trainer = data.batch_size, data.trainer
    return [
        question_loader(data.tokenizer, data.questions(split), size, trainer),
        passage_loader(data.tokenizer, data.passages(split), size, trainer),
    ]


def unlearning_loader(
    tokenizer: Any,
    forget: Sequence[str],
    retain: Sequence[str],
    batch_size: int,
    trainer: Any,
    *,
    passes: int = 1,
    keep_rest: bool = False,
) -> DataLoader:
    """Pairs of a forget and a retain batch, numbered over all ranks and passes."""
    rows = zip(
        encode_texts(tokenizer, forget, None), encode_texts(tokenizer, retain, None), strict=True
    )
    batches = chunks(list(rows), batch_size) * passes
    collate = token_collate(tokenizer)

    def pair_collate(items: list[tuple[int, Any]]) -> dict[str, Any]:
        [(id, batch)] = items
        forget_rows, retain_rows = zip(*batch, strict=True)
        return {"id": id, "forget": collate(forget_rows), "retain": collate(retain_rows)}

    one_each = [[index] for index in range(len(batches))]
    numbered = list(enumerate(batches))
    return batch_loader(numbered, one_each, trainer, pair_collate, keep_rest=keep_rest)


def token_collate(tokenizer: Any) -> Any:
    """Make the function that pads token lists on the right."""
    pad_id, uncounted_ids = padding_id(tokenizer), uncounted_token_ids(tokenizer)
    return lambda rows: pad_sequences(rows, pad_id, uncounted_ids)


def chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Consecutive pieces of `size` items, the last one possibly shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
