"""Forget and retain text from the hub or from disk, to make guards for a benchmark from."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dsg.errors import UserError
from dsg.io import dataset_revision, load_rows, short_name
from dsg.selection import RETAIN_FRACTIONS, check_texts, describe_texts, evenly, split_by_hash


@dataclass(frozen=True)
class Corpus:
    """One source of text."""

    source: str
    """Hub name, `@revision` pins it; a folder in the hub's layout; or a JSONL, JSON, CSV or Parquet
    file."""
    config: str | None = None
    """Configuration of the data set; None where there is only one."""
    split: str = "train"
    """Split of the data set."""
    column: str = "text"
    """Column that holds the text."""
    limit: int | None = None
    """Texts at most, taken evenly from all over the source; None for all."""
    min_chars: int = 1
    """Shorter texts are left out; blank ones always are."""
    max_chars: int | None = None
    """Longer texts are cut after so many characters; None for not."""

    def texts(self) -> list[str]:
        """The texts, in the order of the source.

        Raises:
            UserError: The source cannot be read, has no such column of strings or no text that is
                long enough, or a limit is less than 1.
        """
        for name in ("limit", "min_chars", "max_chars"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"`{name}` of {self.source!r} must be at least 1, got {value}.")
        rows = load_rows(self.source, self.config, self.split)
        texts = [self._text(row) for row in rows]
        long_enough = [text for text in texts if len(text) >= self.min_chars and text.strip()]
        if not long_enough:
            raise UserError(
                f"{self.source!r} must hold a text of at least {self.min_chars} characters, got "
                f"none in {len(rows)} rows; lower `min_chars` or correct `column`."
            )
        taken = evenly(long_enough, self.limit or len(long_enough))
        return [text[: self.max_chars] for text in taken]

    def facts(self, texts: Sequence[str]) -> dict[str, Any]:
        """Where texts came from, how many they are, and their hash; no place on this machine."""
        return {
            "source": short_name(self.source),
            "revision": dataset_revision(self.source, self.config),
            "config": self.config,
            "split": self.split,
            **describe_texts(texts),
        }

    def _text(self, row: dict[str, Any]) -> str:
        text = row.get(self.column)
        if not isinstance(text, str):
            raise UserError(
                f"`column` of {self.source!r} must name a column of strings, got "
                f"{self.column!r}, and the columns are {sorted(row)}; choose one."
            )
        return text


@dataclass(frozen=True)
class CorpusSettings:
    """Which text a guard is made from."""

    retain: list[Corpus]
    """Text to be retained: half selects features, a quarter sets the threshold, a quarter measures
    the false-positive rate. A text's part follows from its hash."""
    forget: list[Corpus] = field(default_factory=list)
    """Text about what is to be forgotten; needed unless the features are given."""
    near: list[Corpus] = field(default_factory=list)
    """Benign text of the forget domain's neighbourhood, which `dsg_near` calibrates with too."""


class Corpora:
    """The texts of a guard, read when they are first asked for.

    Args:
        settings: Which text.
    """

    def __init__(self, settings: CorpusSettings) -> None:
        self.settings = settings

    def forget_texts(self) -> list[str]:
        """Texts about what is to be forgotten.

        Raises:
            UserError: As for `Corpus.texts`; or two parts share a text.
        """
        return self._texts["forget"]

    def retain_texts(self) -> list[str]:
        """Retain texts for the selection of features.

        Raises:
            UserError: As for `forget_texts`.
        """
        return self._texts["retain_selection"]

    def calibration_texts(self, near: bool) -> list[str]:
        """Retain texts that set the threshold.

        Args:
            near: Whether text near the forget domain is added.

        Raises:
            UserError: As for `forget_texts`; or `near` where no such text is given.
        """
        if near and not self.settings.near:
            raise UserError(
                "`near` of the corpora must hold text for a guard that is calibrated with the near "
                "domain, got none; give some or use the method dsg."
            )
        return self._texts["retain_calibration"] + (self._texts["near"] if near else [])

    def heldout_texts(self) -> list[str]:
        """Retain texts for the false-positive rate.

        Raises:
            UserError: As for `forget_texts`.
        """
        return self._texts["retain_heldout"]

    def facts(self) -> dict[str, Any]:
        """Sources, revisions, numbers and hashes of the texts; empty where none were read."""
        if "_read" not in vars(self):  # an evaluation without a guard needs none
            return {}
        return {
            kind: [
                corpus.facts(texts) for corpus, texts in zip(corpora, self._read[kind], strict=True)
            ]
            for kind, corpora in self._kinds().items()
        }

    def _kinds(self) -> dict[str, list[Corpus]]:
        settings = self.settings
        return {"forget": settings.forget, "retain": settings.retain, "near": settings.near}

    @functools.cached_property
    def _read(self) -> dict[str, list[list[str]]]:
        return {
            kind: [corpus.texts() for corpus in corpora] for kind, corpora in self._kinds().items()
        }

    @functools.cached_property
    def _texts(self) -> dict[str, list[str]]:
        joined = {kind: list(itertools.chain(*parts)) for kind, parts in self._read.items()}
        selection, calibration, heldout = split_by_hash(joined.pop("retain"), RETAIN_FRACTIONS)
        parts = {
            **joined,
            "retain_selection": selection,
            "retain_calibration": calibration,
            "retain_heldout": heldout,
        }
        check_texts(parts)
        return parts


class FromCorpora:
    """A data module whose guard is made from `corpora`."""

    corpora: Corpora | None

    def forget_texts(self) -> list[str]:
        """Forget texts of `corpora`."""
        return self._given_corpora().forget_texts()

    def retain_texts(self) -> list[str]:
        """Retain texts of `corpora` that select features."""
        return self._given_corpora().retain_texts()

    def calibration_texts(self, near: bool) -> list[str]:
        """Calibration texts of `corpora`."""
        return self._given_corpora().calibration_texts(near)

    def heldout_texts(self) -> list[str]:
        """Held-out texts of `corpora`."""
        return self._given_corpora().heldout_texts()

    def _given_corpora(self) -> Corpora:
        if self.corpora is None:
            raise UserError(
                "`corpora` must name the texts to make a guard from, got none; give `forget` and "
                "`retain` there, or load a saved guard (`artifact`)."
            )
        return self.corpora
