"""The file of a question filter: which questions a model knows for certain, and which model."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsg.errors import UserError
from dsg.evaluation.benchmarks.multiple_choice.permutations import RULES, Rule, kept_rows
from dsg.evaluation.benchmarks.multiple_choice.prompts import ChoiceRow, rows_digest
from dsg.evaluation.items import Protocol
from dsg.io import (
    noted_revision,
    read_json,
    short_name,
    write_atomically,
)

FILTER_FILE = "questions.json"

_WEIGHTS = "*.safetensors"
_NUM_SAMPLES, _SAMPLE_BYTES = 512, 4096


@dataclass(frozen=True)
class FilteredModel:
    """Which model a filter was made with.

    Attributes:
        name: Hub name, or the folder's name without its place.
        revision: Commit on the hub, if it came from there; that of its base for an adapter.
        weights: See `weights_sample`; None for a model of the hub.
        model_type: Architecture's name in Transformers.
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        vocab_size: Tokens of the model's vocabulary.
    """

    name: str
    revision: str | None
    weights: str | None
    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int

    @classmethod
    def of(cls, model_name: str, config: Any) -> "FilteredModel":
        """The model of this folder or hub name.

        Args:
            model_name: As the user gave it.
            config: Its configuration, as `load_config` or `load_causal_lm` gives it; that of its
                base model for an adapter.
        """
        text = config.get_text_config()
        folder = Path(model_name)
        return cls(
            name=short_name(model_name),
            revision=noted_revision(config),
            weights=weights_sample(folder) if folder.is_dir() else None,
            model_type=config.model_type,
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
        )

    def difference(self, other: "FilteredModel") -> str | None:
        """Why the other is another model, in words; None if it is the same one.

        Folders are told apart by their weights, as they may be moved and renamed; models of the hub
        by name, and by revision where both are known.
        """
        mine, others = asdict(self), asdict(other)
        names = ["model_type", "num_layers", "hidden_size", "vocab_size"]
        if self.weights is None or other.weights is None:
            names.append("name")
        for name in ("revision", "weights"):
            if mine[name] is not None and others[name] is not None:
                names.append(name)
        for name in names:
            if mine[name] != others[name]:
                return f"{name} is {mine[name]!r} there and {others[name]!r} here"
        return None


def weights_sample(folder: Path) -> str | None:
    """SHA-256 of pieces all over a folder's safetensors and of their sizes, 16 hex digits.

    Reading all of a large model takes minutes. Training changes weights everywhere in a layer, so
    that pieces of each file show it; a change of a few single weights can be missed.
    """
    digest = hashlib.sha256()
    paths = sorted(folder.glob(_WEIGHTS))
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for number in range(_NUM_SAMPLES):
                file.seek(number * max(size // _NUM_SAMPLES, _SAMPLE_BYTES))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16] if paths else None


def filter_content(
    model: FilteredModel,
    protocol: Protocol,
    sets: Mapping[str, Sequence[ChoiceRow]],
    correct: Mapping[int, bool],
) -> dict[str, Any]:
    """What a filter's file holds, in plain values.

    Args:
        model: The model that answered.
        protocol: How it was asked.
        sets: All questions of each set; numbered one set after the other.
        correct: Outcome of each variant of each question, see `permutations.kept_rows`.
    """
    rows = [row for name in sets for row in sets[name]]
    kept = {rule: set(rows_kept) for rule, rows_kept in kept_rows(rows, correct).items()}
    return {
        "model": asdict(model),
        "protocol": protocol,
        "sets": {
            name: {
                "n": len(rows),
                "sha256": rows_digest(list(rows)),
                **{rule: [row.key for row in rows if row in kept[rule]] for rule in RULES},
            }
            for name, rows in sets.items()
        },
    }


def write_filter(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a filter's file in one step."""
    return write_atomically(path, json.dumps(content, indent=1) + "\n")


class QuestionFilter:
    """A filter's file, read back.

    Args:
        path: The file, or the run directory that holds it.
        rule: Which questions to keep.

    Attributes:
        facts: The model, protocol and rule.

    Raises:
        UserError: There is no such file, or it is none.
    """

    def __init__(self, path: str | Path, rule: Rule) -> None:
        self.path = Path(path) / FILTER_FILE if Path(path).is_dir() else Path(path)
        self.rule: Rule = rule
        try:
            content = read_json(self.path)
            self._sets: dict[str, dict[str, Any]] = content["sets"]
            self._model = FilteredModel(**content["model"])
            self.facts = {**asdict(self._model), "protocol": content["protocol"], "rule": rule}
        except UserError as error:
            raise UserError(
                f"`keep` must be the {FILTER_FILE} of a question-filter run, or that run's "
                f"directory, got {str(path)!r} ({str(error).removesuffix('.')}); run dsg validate "
                "-c configs/select/question_filter.yaml."
            ) from None
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"`keep` must be the {FILTER_FILE} of a question-filter run, got {str(path)!r}, "
                "which is another file; name the right one."
            ) from None

    def check_model(self, model: FilteredModel) -> None:
        """Refuses another model's filter.

        Raises:
            UserError: It is one.
        """
        difference = self._model.difference(model)
        if difference is not None:
            raise UserError(
                f"`keep` must be a filter made with the model {model.name!r}, got one of "
                f"{self._model.name!r} ({difference}); run the filter for this model, or give the "
                "filter's model as `base_model_name` if this one is a changed copy of it."
            )

    def kept(self, name: str, rows: Sequence[ChoiceRow]) -> list[ChoiceRow]:
        """The questions of a set that are kept, in the given order.

        Raises:
            UserError: The filter does not know the set, or knows it with other questions.
        """
        filtered = self._sets.get(name)
        if filtered is None:
            raise UserError(
                f"`keep` must hold the set {name!r}, got one of {', '.join(self._sets)}; run the "
                "filter for all sets."
            )
        digest = rows_digest(list(rows))
        if filtered["sha256"] != digest:
            raise UserError(
                f"`keep` must be made from the same questions of {name!r}, got a filter of "
                f"{filtered['n']} questions whose hash is {filtered['sha256'][:8]} while these "
                f"{len(rows)} have {digest[:8]}; pin the data's revision or run the filter again."
            )
        keys = set(filtered[self.rule])
        return [row for row in rows if row.key in keys]
