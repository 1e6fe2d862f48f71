"""What a report is made of beside `results.jsonl`, and `table.csv` that is made of it.

`report.json` is UTF-8 JSON, written here and read here; floats carry 6 significant digits. Its
parts, none of which a run must have::

    {"densities": {"dsg": {"threshold": 0.21, "domains": {"forget": [0.5, ...], "retain": [...]}}},
     "features": [{"feature_id": 17, "forget_score": 0.8, "ratio": 91.0, "promoted": ["virus", ...],
                   "contexts": [{"before": "the ", "token": "virus", "after": " spreads",
                                 "activation": 4.2}]}],
     "settings": [{"method": "dsg", "chosen": {"num_features": 20}, "tried": 24,
                   "validation": {"forget_accuracy": 0.22, "retain_accuracy": 0.96}}],
     "tries": [{"seed": 0, "method": "dsg", "settings": "...", "chosen": true, ...}],
     "attempts": [{"seed": 0, "method": "rmu", "attack": "lora", "lr": 0.003, "best": true, ...}],
     "times": [{"method": "rmu", "metric": "seconds_to_unlearn", "value": 12.3, ...}]}

`densities` lie behind a method's gate; `features` come in the order of selection, with what they
respond to and promote; `settings` were chosen on the validation half. A grid adds all `tries` of
its methods and `attempts` of its attackers, and rows of `times`, which are no part of the results.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsg.errors import UserError
from dsg.evaluation import below_chance, mean_over_runs
from dsg.io import parse_json, read_text, write_atomically

Row = Mapping[str, Any]

DRAWN_FILE = "report.json"
TABLE_FILE = "table.csv"
_PARTS = ("densities", "features", "settings")  # each was a file of its own in earlier versions
_FEATURE = ("feature_id", "forget_score", "ratio", "contexts", "promoted")
_CONTEXT = ("before", "token", "after", "activation")

# What tells two lines of the table apart, in the order of its columns.
_PLACE = (
    *("phase", "experiment", "dataset", "method", "mode", "guard", "attack", "request", "epoch"),
    *("split", "domain", "protocol", "metric"),
)


@dataclass(frozen=True)
class Densities:
    """Densities of one guard: the threshold and rho of every sequence, by domain."""

    threshold: float
    domains: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class ChosenSettings:
    """The settings of one method, how many were tried, and their scores on validation facts."""

    method: str
    chosen: Mapping[str, Any]
    tried: int
    validation: Mapping[str, float]


@dataclass(frozen=True)
class Drawn:
    """What `report.json` holds; parts that the run has not are empty."""

    densities: Mapping[str, Densities]
    features: Sequence[Mapping[str, Any]]
    settings: Sequence[ChosenSettings]
    times: Sequence[Row]


def write_drawn(
    run_dir: str | Path,
    *,
    densities: Mapping[str, Densities] | None = None,
    settings: Iterable[ChosenSettings] | None = None,
    **lists: Iterable[Row],
) -> Path:
    """Write parts of `report.json`; those that are not given stay as they are.

    Args:
        run_dir: Folder of the run.
        densities: By method.
        settings: One for each method.
        **lists: `features`, `tries`, `attempts` or `times`.
    """
    content = _content(run_dir) | {name: list(items) for name, items in lists.items()}
    if densities is not None:
        content["densities"] = {name: asdict(item) for name, item in sorted(densities.items())}
    if settings is not None:
        content["settings"] = [asdict(item) for item in settings]
    text = json.dumps(_rounded(content), indent=1, ensure_ascii=False)
    return write_atomically(Path(run_dir) / DRAWN_FILE, text + "\n")


def read_drawn(run_dir: str | Path) -> Drawn:
    """Read `report.json`, or the files that earlier versions wrote in its place.

    Raises:
        UserError: It is no JSON, or has another form.
    """
    content = _content(run_dir)
    try:
        return Drawn(
            {name: Densities(**item) for name, item in content.get("densities", {}).items()},
            [_feature(item) for item in content.get("features", ())],
            [ChosenSettings(**item) for item in content.get("settings", ())],
            content.get("times", ()),
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{DRAWN_FILE} does not have the form that `dsg.report.files` describes ({error}); "
            "delete it or write it again."
        ) from None


def write_table(run_dir: str | Path, rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Write `table.csv`, in one atomic step; what is None stays empty.

    Args:
        run_dir: Folder of the run.
        rows: Its result rows, and times.

    Returns:
        Its lines.
    """
    lines = table_rows(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomically(Path(run_dir) / TABLE_FILE, text.getvalue())
    return lines


def table_rows(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One line per measurement, over all of its seeds.

    Of measurements that were repeated after every epoch the last one counts; a line of its phase
    says which. What an attack recovered is a metric like any other.

    Args:
        rows: Result rows.

    Returns:
        Lines with `phase` (`unlearning`, `attack` or `sequence`), what was measured, `mean`, `low`,
        `high` (Student's t over seeds on the metric's scale; None for a single seed), `n_seeds`,
        and of accuracies `n_below_chance`, the seeds in which it lies below chance.
    """
    by_place: dict[tuple[Any, ...], dict[Any, Row]] = {}
    for row in _after_last_epoch(rows):
        if row["value"] is None:
            continue
        place = {**row, "phase": _phase(row)}
        key = tuple(place[name] for name in _PLACE)
        by_place.setdefault(key, {})[row["seed"]] = row
    lines = []
    for key in sorted(by_place, key=lambda key: [(part is not None, str(part)) for part in key]):
        place = dict(zip(_PLACE, key, strict=True))
        over_seeds = list(by_place[key].values())
        estimate = mean_over_runs(place["metric"], [row["value"] for row in over_seeds])
        numbers = {"mean": estimate.value, "low": estimate.low, "high": estimate.high}
        counts = {"n_seeds": estimate.n, "n_below_chance": _num_below_chance(over_seeds)}
        lines.append({**place, **_rounded(numbers), **counts})
    return lines


def _phase(row: Row) -> str:
    if row["attack"] is not None:
        return "attack"
    return "unlearning" if row["request"] is None else "sequence"


def _after_last_epoch(rows: Iterable[Row]) -> list[Row]:
    keys = [name for name in (*_PLACE[1:], "seed") if name != "epoch"]
    last: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in keys)
        if key not in last or (row["epoch"] or 0) >= (last[key]["epoch"] or 0):
            last[key] = row
    return list(last.values())


def _num_below_chance(rows: Iterable[Row]) -> int | None:
    counted = [row for row in rows if row["metric"] == "accuracy" and row["n"]]
    below = [row for row in counted if below_chance(row["value"] * row["n"], row["n"])]
    return len(below) if counted else None


def _feature(item: Mapping[str, Any]) -> dict[str, Any]:
    feature = {name: item[name] for name in _FEATURE}
    contexts = [{name: context[name] for name in _CONTEXT} for context in feature["contexts"]]
    return {**feature, "contexts": contexts}


def _content(run_dir: str | Path) -> dict[str, Any]:
    path = Path(run_dir) / DRAWN_FILE
    if path.is_file():
        return _parsed(path)
    former = {name: Path(run_dir) / f"{name}.json" for name in _PARTS}
    return {name: _parsed(path) for name, path in former.items() if path.is_file()}


def _parsed(path: Path) -> Any:
    return parse_json(read_text(path), str(path), "delete it or write it again")


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
