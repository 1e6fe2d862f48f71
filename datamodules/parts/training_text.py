"""Text as training rows: running text in pieces, answers after their questions, and loaders."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from datamodules.parts.loading import batch_loader
from dsg.errors import UserError
from dsg.lm import (
    TokenBatch,
    encode_texts,
    pad_sequences,
    padding_id,
    shared_prefix,
    uncounted_token_ids,
)

Item = TypeVar("Item")


@dataclass(frozen=True)
class TrainingRow:
    """Token ids of one sequence.

    Attributes:
        ids: With the tokenizer's own special tokens.
        num_given: Leading tokens that are read but not learnt; None learns every counted token.
    """

    ids: list[int]
    num_given: int | None = None


def word_pieces(texts: Sequence[str], num_words: int) -> list[str]:
    """Cut texts after every `num_words` words; a piece without a word is left out."""
    pieces: list[str] = []
    for text in texts:
        words = re.findall(r"\S+\s*", text)
        pieces += [
            "".join(words[start : start + num_words]).rstrip()
            for start in range(0, len(words), num_words)
        ]
    return pieces


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, taken evenly from all over them."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def running_rows(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[TrainingRow]:
    """Cut texts into pieces of `max_length` tokens, each with the bos token that texts begin with.

    Every token of a text comes once; its last piece may be short. Texts are not joined.
    """
    rows = []
    for text, ids in zip(texts, encode_texts(tokenizer, texts, None), strict=True):
        bare = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        first = ids[:1] if ids[:1] != bare[:1] else []
        size = max_length - len(first)
        if size < 1:
            raise UserError(f"`max_length` must be at least 2 tokens, got {max_length}; raise it.")
        rows += [
            TrainingRow([*first, *bare[start : start + size]])
            for start in range(0, len(bare), size)
        ]
    return rows


def answer_rows(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], max_length: int
) -> list[TrainingRow]:
    """Prompts with their answers and a closing eos token; the prompt is not learnt.

    Raises:
        UserError: Nothing is left of an answer when the whole is cut to `max_length` tokens.
    """
    wholes = encode_texts(tokenizer, [prompt + answer for prompt, answer in pairs], None)
    prompts = encode_texts(tokenizer, [prompt for prompt, _ in pairs], None)
    rows = []
    for (prompt, _), whole, given in zip(pairs, wholes, prompts, strict=True):
        end = [] if whole[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]
        # A tokenizer may merge the answer's first characters with the prompt's last ones.
        shared = shared_prefix(given, whole)
        ids = [*whole, *end][:max_length]
        if len(ids) <= shared:
            raise UserError(
                f"`max_length` must leave room for an answer, got {max_length} tokens for a prompt "
                f"of {shared} ({prompt[:60]!r}); raise it."
            )
        rows.append(TrainingRow(ids, shared))
    return rows


def training_loader(
    tokenizer: Any, rows: Sequence[TrainingRow], batch_size: int, seed: int, trainer: Any
) -> DataLoader:
    """Batches of rows in an order that the seed decides, the same in every epoch."""
    return batch_loader(
        rows, _batches(len(rows), batch_size, seed), trainer, _collate(tokenizer), keep_rest=False
    )


def pair_loader(
    tokenizer: Any,
    forget: Sequence[TrainingRow],
    retain: Sequence[TrainingRow],
    batch_size: int,
    seed: int,
    trainer: Any,
) -> DataLoader:
    """Batches of forget rows beside as many retain rows, numbered over all ranks.

    The order of the forget rows is that of the seed in every epoch. Each is paired with any of the
    retain rows, drawn anew in every epoch as in the code of TOFU and OpenUnlearning (MUSE's own
    keeps one partner for ever). Seed, epoch and the batch's number decide the draw, so that neither
    ranks nor an interruption change it.
    """
    collate = _collate(tokenizer)
    numbered = list(enumerate(_batches(len(forget), batch_size, seed)))
    keep_rest = trainer is not None and not trainer.lightning_module.automatic_optimization

    def pairs(items: list[tuple[int, list[int]]]) -> dict[str, Any]:
        [(number, places)] = items
        epoch = trainer.current_epoch if trainer is not None else 0
        draw = random.Random(f"retain partners {seed} {epoch} {number}")
        return {
            "id": number,
            "forget": collate([forget[place] for place in places]),
            "retain": collate(draw.choices(retain, k=len(places))),
        }

    one_each = [[index] for index in range(len(numbered))]
    return batch_loader(numbered, one_each, trainer, pairs, keep_rest=keep_rest)


def _batches(count: int, batch_size: int, seed: int) -> list[list[int]]:
    if batch_size < 1:
        raise UserError(f"`train_batch_size` must be at least 1, got {batch_size}; raise it.")
    order = random.Random(f"training order {seed}").sample(range(count), count)
    return [order[start : start + batch_size] for start in range(0, count, batch_size)]


def _collate(tokenizer: Any) -> Any:
    """Make the function that pads rows on the right and marks what is learnt as counted."""
    pad_id, uncounted_ids = padding_id(tokenizer), uncounted_token_ids(tokenizer)

    def collate(rows: Sequence[TrainingRow]) -> TokenBatch:
        batch = pad_sequences([row.ids for row in rows], pad_id, uncounted_ids)
        learnt = batch.token_mask.clone()
        places = torch.arange(learnt.shape[1])
        for number, row in enumerate(rows):
            if row.num_given is not None:
                # With the closing eos, or the model would never learn to stop.
                learnt[number] = (places >= row.num_given) & (places < len(row.ids))
        return replace(batch, token_mask=learnt)

    return collate
