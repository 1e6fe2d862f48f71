"""Turns texts and items into loaders: the one place where batches of every kind are made."""

import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from datamodules.parts.batches import batch_loader
from datamodules.parts.training_text import TrainingRow
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
from dsg.guard import GuardSettings
from dsg.io import load_pretrained
from dsg.lm import (
    TokenBatch,
    check_vocabulary,
    encode_texts,
    length_batches,
    load_config,
    padding_for,
)
from dsg.selection import check_texts, compact_sequences, guard_texts

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


@dataclass(frozen=True)
class Rows:
    """Rows that `fit` trains on, in an order that the seed decides, the same in every epoch.

    Attributes:
        rows: The text.
        purpose: Part of what the order is drawn from.
    """

    rows: Sequence[TrainingRow]
    purpose: Literal["training", "attack"] = "training"


@dataclass(frozen=True)
class Pairs:
    """Forget rows beside as many retain rows, for unlearning.

    Attributes:
        forget: The text to be forgotten.
        retain: The text to be retained.
        fixed: Row i keeps retain row i, in the order given. Otherwise the order of the forget rows
            is the seed's, and each is paired with any of the retain rows, drawn anew in every epoch
            as in the code of TOFU and OpenUnlearning (MUSE's own keeps one partner for ever). Seed,
            epoch and the batch's number decide the draw, so that neither ranks nor an interruption
            change it.
        passes: How often an epoch goes through them.
    """

    forget: Sequence[TrainingRow]
    retain: Sequence[TrainingRow]
    fixed: bool = False
    passes: int = 1


def training_loader(
    tokenizer: Any, text: Rows | Pairs, batch_size: int, seed: int, trainer: Any
) -> DataLoader:
    """Batches of rows, or of pairs, which are numbered over all ranks and passes."""
    if batch_size < 1:
        raise UserError(f"`train_batch_size` must be at least 1, got {batch_size}; raise it.")
    collate = training_collate(tokenizer)
    if isinstance(text, Rows):
        batches = _shuffled(len(text.rows), batch_size, f"{text.purpose} order {seed}")
        return batch_loader(text.rows, batches, trainer, collate, keep_rest=False)
    forget, retain = text.forget, text.retain
    order = None if text.fixed else f"training order {seed}"
    numbered = list(enumerate(_shuffled(len(forget), batch_size, order) * text.passes))

    def pairs(items: list[tuple[int, list[int]]]) -> dict[str, Any]:
        [(number, places)] = items
        epoch = trainer.current_epoch if trainer is not None else 0
        draw = random.Random(f"retain partners {seed} {epoch} {number}")
        return {
            "id": number,
            "forget": collate([forget[place] for place in places]),
            "retain": collate(
                [retain[place] for place in places]
                if text.fixed
                else draw.choices(retain, k=len(places))
            ),
        }

    # Dampening sums up every batch; gradient steps need equally many on each rank.
    keep_rest = trainer is not None and trainer.lightning_module.keeps_rest
    return batch_loader(numbered, _singly(numbered), trainer, pairs, keep_rest=keep_rest)


def training_collate(tokenizer: Any) -> Any:
    """Make the function that pads rows on the right and marks what is learnt as counted."""
    pad = padding_for(tokenizer)

    def collate(rows: Sequence[TrainingRow]) -> TokenBatch:
        batch = pad([row.ids for row in rows])
        learnt = batch.token_mask.clone()  # [batch, seq]
        places = torch.arange(learnt.shape[1])
        for number, row in enumerate(rows):
            if row.num_given is not None:
                # With the closing eos, or the model would never learn to stop.
                learnt[number] = (places >= row.num_given) & (places < len(row.ids))
        return replace(batch, token_mask=learnt)

    return collate


def selection_loader(data: Any) -> DataLoader:
    """All texts, one purpose after the other, in the order in which a selection reads them.

    Texts are cut and batched as the settings of the run's guard say (`guard_settings` of the
    module), so that the batches are those of `dsg.build_guard`. In each step all ranks have batches
    of the same purpose, some perhaps an empty one.

    Args:
        data: A data module that is a `TextSource`, set up in a run that makes a guard.

    Raises:
        UserError: Two purposes share a text.
    """
    settings: GuardSettings = data.trainer.lightning_module.guard_settings
    texts = guard_texts(
        data,
        near=settings.method == "dsg_near",
        forget=settings.parts().selection != "ids",
    )
    check_texts(texts)
    pad = padding_for(data.tokenizer)

    def collate(batches: list[tuple[str, list[int], list[np.ndarray]]]) -> dict[str, Any]:
        [(purpose, ids, rows)] = batches
        tokens = pad([row.tolist() for row in rows])
        return {"purpose": purpose, "ids": torch.tensor(ids), "tokens": tokens if ids else None}

    batches = _rounds(data, texts, settings)
    return batch_loader(batches, _singly(batches), data.trainer, collate, keep_rest=True)


def _rounds(
    data: Any, texts: Mapping[str, Sequence[str]], settings: GuardSettings
) -> list[tuple[str, list[int], list[np.ndarray]]]:
    """Batches of similar length, filled up with empty ones until every rank has equally many."""
    rounds = []
    for purpose in texts:
        sequences = compact_sequences(data.tokenizer, texts[purpose], settings.max_length)
        batches = length_batches([len(row) for row in sequences], settings.batch_size)
        batches += [[]] * (-len(batches) % data.trainer.world_size)
        rounds += [(purpose, ids, [sequences[index] for index in ids]) for ids in batches]
    return rounds


def _shuffled(count: int, batch_size: int, order: str | None) -> list[list[int]]:
    """Batches of places, drawn by the name of an order; None keeps them in turn."""
    places = list(range(count))
    if order is not None:
        places = random.Random(order).sample(places, count)
    return [places[start : start + batch_size] for start in range(0, count, batch_size)]


def _singly(batches: Sequence[Any]) -> list[list[int]]:
    return [[index] for index in range(len(batches))]
