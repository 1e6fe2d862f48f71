"""Loaders whose batches are formed before anybody asks for ranks."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from datamodules.parts.resumable import ResumableLoader
from datamodules.parts.samplers import GlobalBatches
from dsg.errors import UserError
from dsg.evaluation import (
    Passage,
    Prompt,
    Question,
    encode_passages,
    encode_question,
    passage_collate,
    prompt_collate,
    question_collate,
)
from dsg.evaluation.benchmarks.multiple_choice.question_filter import load_config
from dsg.io import load_pretrained
from dsg.lm import check_vocabulary, encode_texts, length_batches

BatchSize = int | Literal["auto"]


def load_tokenizer(model_name: str) -> Any:
    """The tokenizer that belongs to a model.

    Args:
        model_name: Hugging Face folder or hub name, perhaps with `@revision`.

    Raises:
        UserError: There is none, the hub refuses it, or it has more tokens than its model.
    """
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, model_name, " with a tokenizer")
    try:
        config = load_config(model_name)
    except UserError:  # the folder holds a tokenizer alone
        return tokenizer
    check_vocabulary(tokenizer, config.get_text_config().vocab_size, model_name)
    return tokenizer


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
    tokenizer: Any, questions: Sequence[Question], batch_size: BatchSize, trainer: Any
) -> DataLoader:
    """Each question exactly once, those of similar length together."""
    encoded = {question: encode_question(tokenizer, question) for question in questions}
    lengths = [max(map(len, encoded[question][1])) for question in questions]
    kinds = [(question.protocol, len(question.options)) for question in questions]
    batches = _batches_of_kinds(kinds, lengths, batch_size)
    collate = question_collate(tokenizer, encoded)
    return batch_loader(questions, batches, trainer, collate, keep_rest=True)


def passage_loader(
    tokenizer: Any,
    passages: Sequence[Passage],
    batch_size: BatchSize,
    trainer: Any,
    max_length: int | None = None,
) -> DataLoader:
    """Each passage exactly once, those of similar length together."""
    encoded = encode_passages(tokenizer, passages, max_length)
    batches = _batches_of_kinds(
        [num_context > 0 for num_context, _ in encoded],
        [len(ids) for _, ids in encoded],
        batch_size,
    )
    collate = passage_collate(tokenizer, max_length)
    return batch_loader(passages, batches, trainer, collate, keep_rest=True)


def prompt_loader(
    tokenizer: Any, prompts: Sequence[Prompt], batch_size: BatchSize, trainer: Any
) -> DataLoader:
    """Each prompt exactly once, those of similar length together."""
    encoded = encode_texts(tokenizer, [prompt.text for prompt in prompts], None)
    lengths = [len(ids) + p.max_new_tokens for ids, p in zip(encoded, prompts, strict=True)]
    kinds = [(prompt.max_new_tokens, prompt.stop) for prompt in prompts]
    batches = _batches_of_kinds(kinds, lengths, batch_size)
    return batch_loader(prompts, batches, trainer, prompt_collate(tokenizer), keep_rest=True)


def _batches_of_kinds(
    kinds: Sequence[Hashable], lengths: Sequence[int], batch_size: BatchSize
) -> list[list[int]]:
    """Batches of similar length in which all items are of one kind."""
    members: dict[Hashable, list[int]] = {}
    for place, kind in enumerate(kinds):
        members.setdefault(kind, []).append(place)
    return [
        [places[index] for index in batch]
        for places in members.values()
        for batch in length_batches([lengths[place] for place in places], batch_size)
    ]
