"""Text as training rows: running text in pieces, answers after their questions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsg.errors import UserError
from dsg.lm import encode_texts, shared_prefix


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


def whole_rows(tokenizer: Any, texts: Sequence[str], max_length: int | None) -> list[TrainingRow]:
    """Each text as one row, cut to `max_length` tokens."""
    return [TrainingRow(ids) for ids in encode_texts(tokenizer, texts, max_length)]


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
