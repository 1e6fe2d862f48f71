"""Splits of texts by their hash, so that a text's split never depends on the other texts."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from dsg.errors import UserError

Item = TypeVar("Item")

RETAIN_FRACTIONS = (0.5, 0.25, 0.25)
FORGET_FRACTIONS = (0.75, 0.25)


def split_by_hash(texts: Iterable[str], fractions: Sequence[float]) -> list[list[str]]:
    """Splits texts by their SHA-256, so that a text's split never depends on the other texts.

    Case and spacing do not enter the hash: a reformatted passage stays in its split.

    Args:
        texts: Texts in any order; equal texts share a split.
        fractions: Expected share of each split, at least 0, summing to 1.

    Returns:
        The texts of each split, in the given order; sizes follow the fractions only on average.

    Raises:
        UserError: If the fractions are negative or do not sum to 1.
    """
    if min(fractions, default=-1.0) < 0 or abs(sum(fractions) - 1.0) > 1e-9:
        raise UserError(f"`fractions` must be at least 0 and sum to 1, got {list(fractions)}.")
    bounds = list(itertools.accumulate(fractions))[:-1]
    splits: list[list[str]] = [[] for _ in fractions]
    for text in texts:
        place = int.from_bytes(_sha256(normalised(text)).digest()[:8], "big") / 2**64
        splits[sum(place >= bound for bound in bounds)].append(text)
    return splits


def evenly(items: Sequence[Item], count: int, *, repeat: bool = False) -> list[Item]:
    """At most `count` of the items, taken evenly from all over them.

    Args:
        items: In an order that is kept.
        count: How many.
        repeat: Whether fewer items are repeated until they are as many.
    """
    count = count if repeat else min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def texts_digest(texts: Iterable[str]) -> str:
    """SHA-256 over the SHA-256 of each text, whatever their order."""
    return _sha256("".join(sorted(_sha256(text).hexdigest() for text in texts))).hexdigest()


def describe_texts(texts: Sequence[str]) -> dict[str, Any]:
    """How many texts there are, and the digest of all of them."""
    return {"n": len(texts), "sha256": texts_digest(texts)}


class TextSource(Protocol):
    """Texts to make a guard from, by purpose."""

    def forget_texts(self) -> Sequence[str]:
        """Texts about what is to be forgotten."""
        ...

    def retain_texts(self) -> Sequence[str]:
        """Retain texts for the selection of features."""
        ...

    def calibration_texts(self, near: bool) -> Sequence[str]:
        """Retain texts that set the threshold; `near` adds the near domain and other hazards."""
        ...

    def heldout_texts(self) -> Sequence[str]:
        """Retain texts for the false-positive rate."""
        ...


def guard_texts(source: TextSource, *, near: bool, forget: bool = True) -> dict[str, Sequence[str]]:
    """All texts of a guard by their purpose; a quarter of the forget texts is held out.

    Args:
        source: Where they come from.
        near: Whether the near domain and other hazards calibrate as well.
        forget: Whether forget texts select features.

    Raises:
        UserError: A purpose that a guard needs text for got none.
    """
    forget_selection, forget_heldout = split_by_hash(source.forget_texts(), FORGET_FRACTIONS)
    parts: dict[str, Sequence[str]] = {
        "forget_selection": forget_selection,
        "retain_selection": source.retain_texts(),
        "retain_calibration": source.calibration_texts(near),
        "retain_heldout": source.heldout_texts(),
        "forget_heldout": forget_heldout,
    }
    needed = ("forget_selection",) * forget + ("retain_selection", "retain_calibration")
    for name in needed:
        if not parts[name]:
            kind = name.split("_")[0]
            num = sum(len(texts) for part, texts in parts.items() if part.startswith(kind))
            raise UserError(
                f"the split {name!r} must hold at least one text, got none of {num} {kind} texts "
                f"(their hashes deal them out); give more {kind} texts."
            )
    return parts


def check_texts(splits: Mapping[str, Sequence[str]]) -> None:
    """Refuses blank texts, and splits that share a text, whatever its case and spacing.

    Raises:
        UserError: If there are such texts.
    """
    seen: dict[str, str] = {}
    for name, texts in splits.items():
        # Within a split, repetitions are the user's weighting.
        for text in dict.fromkeys(map(normalised, texts)):
            if not text:
                raise UserError(
                    f"every text must hold a word, got a blank one in {name!r}; remove it."
                )
            if text in seen:
                raise UserError(
                    f"splits must not share a text, got {text[:60]!r} in {seen[text]!r} and "
                    f"{name!r}; remove it from one of the lists."
                )
            seen[text] = name


def normalised(text: str) -> str:
    """A text without its case and spacing."""
    return " ".join(text.split()).casefold()


def _sha256(text: str) -> Any:
    return hashlib.sha256(text.encode())
