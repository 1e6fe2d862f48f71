"""Rows of a published benchmark: their texts checked, their halves, their guards' texts."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from dsg.errors import UserError
from dsg.io import load_rows
from dsg.selection import RETAIN_FRACTIONS, normalised, split_by_hash

Items = Literal["all", "halves"]


def read_texts(dataset: str, config: str, split: str, *columns: str) -> list[tuple[str, ...]]:
    """The text columns of one split.

    Raises:
        UserError: A column is missing, or a text is blank; and as for `dsg.io.hub.load_rows`.
    """
    return [
        tuple(
            text_of(row, column, f"{dataset}, {config}/{split}, row {number}") for column in columns
        )
        for number, row in enumerate(load_rows(dataset, config, split))
    ]


def text_of(row: dict[str, Any], column: str, place: str) -> str:
    """A row's text.

    Raises:
        UserError: There is none.
    """
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f"{place} must hold a text with a word under {column!r}, got {text!r} among the "
            f"columns {sorted(row)}; mend the data set or name another."
        )
    return text


def half(rows: Sequence[Any], texts: Sequence[str], items: Items, split: str) -> list[Any]:
    """The rows of one evaluation split: all of them, or one half by the hash of their text."""
    if items == "all":
        return list(rows)
    halves = [set(part) for part in split_by_hash(texts, (0.5, 0.5))]
    chosen = halves[0 if split == "validation" else 1]
    return [row for row, text in zip(rows, texts, strict=True) if text in chosen]


def numbered(keys: Iterable[str]) -> list[str]:
    """The keys, a repeated one with its number behind it."""
    seen: dict[str, int] = {}
    unique = []
    for key in keys:
        seen[key] = seen.get(key, 0) + 1
        unique.append(key if seen[key] == 1 else f"{key}-{seen[key]}")
    return unique


def retain_parts(retain: Iterable[str], taken: Iterable[str]) -> list[list[str]]:
    """Retain texts for the selection, the calibration and the false-positive rate of a guard.

    Args:
        retain: Texts; what is also in `taken`, whatever its case and spacing, is left out.
        taken: Texts with another purpose.
    """
    excluded = {normalised(text) for text in taken}
    return split_by_hash(
        [text for text in dict.fromkeys(retain) if normalised(text) not in excluded],
        RETAIN_FRACTIONS,
    )
