"""The tidy table of a grid: a mean over seeds and its 95 % interval on every line."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dsg.evaluation import below_chance, mean_over_runs
from dsg.io import write_atomically

TABLE_FILE = "table.csv"
SECONDS = "seconds_to_unlearn"

# What tells two lines apart, in the order of the columns.
_PLACE = (
    "phase",
    "experiment",
    "dataset",
    "method",
    "mode",
    "guard",
    "attack",
    "request",
    "epoch",
    "split",
    "domain",
    "protocol",
    "metric",
)


def table_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
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
    by_place: dict[tuple[Any, ...], dict[Any, Mapping[str, Any]]] = {}
    for row in _last(rows):
        if row["value"] is None:
            continue
        place = {**row, "phase": _phase(row)}
        key = tuple(place[name] for name in _PLACE)
        by_place.setdefault(key, {})[row["seed"]] = row
    lines = []
    for key in sorted(by_place, key=lambda key: [(part is not None, str(part)) for part in key]):
        place = dict(zip(_PLACE, key, strict=True))
        found = list(by_place[key].values())
        estimate = mean_over_runs(place["metric"], [row["value"] for row in found])
        numbers = {"mean": estimate.value, "low": estimate.low, "high": estimate.high}
        counts = {"n_seeds": estimate.n, "n_below_chance": _num_below_chance(found)}
        lines.append({**place, **_rounded(numbers), **counts})
    return lines


def write_table(path: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    """Write lines that share their keys as CSV, in one atomic step; what is None stays empty."""
    listed = list(lines)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(listed[0]) if listed else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    return write_atomically(path, text.getvalue())


def _phase(row: Mapping[str, Any]) -> str:
    if row["attack"] is not None:
        return "attack"
    return "unlearning" if row["request"] is None else "sequence"


def _last(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """For each measurement of a run the one after its last epoch."""
    keys = [name for name in (*_PLACE[1:], "seed") if name != "epoch"]
    last: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in keys)
        if key not in last or (row["epoch"] or 0) >= (last[key]["epoch"] or 0):
            last[key] = row
    return list(last.values())


def _num_below_chance(rows: Iterable[Mapping[str, Any]]) -> int | None:
    counted = [row for row in rows if row["metric"] == "accuracy" and row["n"]]
    below = [row for row in counted if below_chance(row["value"] * row["n"], row["n"])]
    return len(below) if counted else None


def _rounded(numbers: Mapping[str, float | None]) -> dict[str, float | None]:
    return {
        name: None if value is None else float(f"{value:.6g}") for name, value in numbers.items()
    }
