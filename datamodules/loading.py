"""Loaders whose batches are formed before anybody asks for ranks."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from datamodules.resumable import ResumableLoader
from datamodules.samplers import GlobalBatches
from dsg.errors import UserError
from dsg.scoring import Passage, Question, cloze_collate, encode_question, passage_collate
from dsg.tokens import encode_texts, length_batches


def load_tokenizer(model_name: str) -> Any:
    """The tokenizer that belongs to a model.

    Raises:
        UserError: There is none.
    """
    try:
        return AutoTokenizer.from_pretrained(model_name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"`model_name` must be a Hugging Face folder or hub name with a tokenizer, got "
            f"{model_name!r} ({reason}); check the spelling and that you may read it."
        ) from error


def batch_loader(
    dataset: Sequence[Any],
    batches: Sequence[Sequence[int]],
    trainer: Any,
    collate: Callable[[Any], Any],
    *,
    keep_rest: bool,
) -> DataLoader:
    """Deal whole batches to the ranks of a trainer, equally many steps to each.

    Args:
        dataset: The items.
        batches: Indices of the items of each batch.
        trainer: Supplies rank and number of ranks; None stands for a single process.
        collate: Makes a batch of a list of items.
        keep_rest: Some ranks get an empty last step, a batch that is None, rather than that the
            batches which do not go round are left out. For everything but gradient steps.
    """
    rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
    sampler = GlobalBatches(batches, rank, world_size, keep_rest=keep_rest)
    return ResumableLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=lambda items: collate(items) if items else None,
    )


def question_loader(
    tokenizer: Any, questions: Sequence[Question], batch_size: int, trainer: Any
) -> DataLoader:
    """Each question exactly once, those of similar length together."""
    lengths = [max(map(len, encode_question(tokenizer, q)[1])) for q in questions]
    batches = length_batches(lengths, batch_size)
    return batch_loader(questions, batches, trainer, cloze_collate(tokenizer), keep_rest=True)


def passage_loader(
    tokenizer: Any,
    passages: Sequence[Passage],
    batch_size: int,
    trainer: Any,
    max_length: int | None = None,
) -> DataLoader:
    """Each passage exactly once, those of similar length together."""
    lengths = [len(ids) for ids in encode_texts(tokenizer, [p.text for p in passages], max_length)]
    batches = length_batches(lengths, batch_size)
    collate = passage_collate(tokenizer, max_length)
    return batch_loader(passages, batches, trainer, collate, keep_rest=True)
