"""Optional files of a run that the report shows beside `results.jsonl`.

Each is UTF-8 JSON, written here and read here; floats carry 6 significant digits.

`densities.json`: densities behind the gate, per method and domain::

    {"dsg": {"threshold": 0.21, "domains": {"forget": [0.5, ...], "near": [...], "retain": [...]}}}

`features.json`: what the selected features respond to and promote, in the order of selection::

    [{"feature_id": 17, "forget_score": 0.8, "ratio": 91.0, "promoted": ["virus", ...],
      "contexts": [{"before": "the ", "token": "virus", "after": " spreads", "activation": 4.2}]}]

`settings.json`: how each method's settings were chosen on the validation half::

    [{"method": "dsg", "chosen": {"num_features": 20, "clamp_value": -20.0}, "tried": 24,
      "validation": {"forget_accuracy": 0.22, "retain_accuracy": 0.96}}]
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsg.errors import UserError
from dsg.io import parse_json, read_text, write_atomically

DENSITIES_FILE = "densities.json"
FEATURES_FILE = "features.json"
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Densities:
    """Densities of one guard: the threshold and rho of every sequence, by domain."""

    threshold: float
    domains: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class TokenContext:
    """A token on which a feature is strongly active, with the text around it."""

    before: str
    token: str
    after: str
    activation: float


@dataclass(frozen=True)
class FeatureDescription:
    """One selected feature: its scores, its strongest tokens, the tokens that it promotes.

    `ratio` is None for selection rules that look at no retain text.
    """

    feature_id: int
    forget_score: float
    ratio: float | None
    contexts: Sequence[TokenContext] = field(default_factory=tuple)
    promoted: Sequence[str] = field(default_factory=tuple)

    @classmethod
    def from_json(cls, item: Mapping[str, Any]) -> "FeatureDescription":
        """Undo `dataclasses.asdict`."""
        contexts = [TokenContext(**context) for context in item["contexts"]]
        return cls(**{**item, "contexts": contexts})


@dataclass(frozen=True)
class ChosenSettings:
    """The settings of one method, how many were tried, and their scores on validation facts."""

    method: str
    chosen: Mapping[str, Any]
    tried: int
    validation: Mapping[str, float]


def write_densities(run_dir: str | Path, densities: Mapping[str, Densities]) -> Path:
    """Write `densities.json`: method -> densities."""
    content = {method: asdict(item) for method, item in sorted(densities.items())}
    return _write(run_dir, DENSITIES_FILE, content)


def read_densities(run_dir: str | Path) -> dict[str, Densities]:
    """Read `densities.json`; empty if the run has none."""
    content = _read(run_dir, DENSITIES_FILE, {})
    with _Explained(DENSITIES_FILE):
        return {method: Densities(**item) for method, item in content.items()}


def write_features(run_dir: str | Path, features: Iterable[FeatureDescription]) -> Path:
    """Write `features.json`, in the given order."""
    return _write(run_dir, FEATURES_FILE, [asdict(item) for item in features])


def read_features(run_dir: str | Path) -> list[FeatureDescription]:
    """Read `features.json`; empty if the run has none."""
    content = _read(run_dir, FEATURES_FILE, [])
    with _Explained(FEATURES_FILE):
        return [FeatureDescription.from_json(item) for item in content]


def write_settings(run_dir: str | Path, settings: Iterable[ChosenSettings]) -> Path:
    """Write `settings.json`, in the given order."""
    return _write(run_dir, SETTINGS_FILE, [asdict(item) for item in settings])


def read_settings(run_dir: str | Path) -> list[ChosenSettings]:
    """Read `settings.json`; empty if the run has none."""
    content = _read(run_dir, SETTINGS_FILE, [])
    with _Explained(SETTINGS_FILE):
        return [ChosenSettings(**item) for item in content]


class _Explained:
    """Turns a missing or unknown entry of a side file into one sentence for the user."""

    def __init__(self, file_name: str) -> None:
        self.file_name = file_name

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, TypeError | KeyError | AttributeError):
            raise UserError(
                f"{self.file_name} does not have the form that `dsg.report.files` describes "
                f"({error}); delete it or write it again."
            ) from None


def _write(run_dir: str | Path, file_name: str, content: Any) -> Path:
    text = json.dumps(_rounded(content), indent=1, ensure_ascii=False)
    return write_atomically(Path(run_dir) / file_name, text + "\n")


def _read(run_dir: str | Path, file_name: str, absent: Any) -> Any:
    path = Path(run_dir) / file_name
    if not path.is_file():
        return absent
    return parse_json(read_text(path), str(path), "delete it or write it again")


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if hasattr(value, "tolist"):  # tensors and NumPy arrays
        return _rounded(value.tolist())
    return float(f"{value:.6g}") if isinstance(value, float) else value
