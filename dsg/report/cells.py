"""`cells.csv`: one line per seed, data set and method, for people who want every number."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dsg.evaluation import below_chance
from dsg.io import read_results, write_atomically

CELLS_FILE = "cells.csv"

# Column -> domain, metric and protocol of the row behind it.
_COLUMNS = {
    "forget_accuracy": ("forget", "accuracy", "cloze"),
    "near_accuracy": ("near", "accuracy", "cloze"),
    "other_hazards_accuracy": ("other_hazards", "accuracy", "cloze"),
    "retain_accuracy": ("retain", "accuracy", "cloze"),
    "alignment": ("forget", "alignment", "cloze"),
    "retain_perplexity": ("retain", "perplexity", "passages"),
    "true_positive_rate": ("forget", "trigger_rate", "cloze"),
    "false_positive_rate": ("retain", "trigger_rate", "cloze"),
    "density_auroc": ("forget", "density_auroc", "cloze"),
}


def write_cells(run_dir: str | Path) -> Path | None:
    """Write the table of all side-by-side measurements of a run.

    Accuracies and rates come with the ends of their 95 % interval and with n; `below_chance` is 1
    where forget accuracy lies below chance.

    Args:
        run_dir: Directory with `results.jsonl`.

    Returns:
        The file, or None if the run compared no methods.
    """
    cells = _cells(read_results(run_dir))
    if not cells:
        return None
    names = list(dict.fromkeys(name for cell in cells for name in cell))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    return write_atomically(Path(run_dir) / CELLS_FILE, text.getvalue())


def _cells(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    by_measurement = {measurement: column for column, measurement in _COLUMNS.items()}
    for row in rows:
        column = by_measurement.get((row["domain"], row["metric"], row["protocol"]))
        if column is None or row["attack"] or row["request"] is not None or row["guard"] == "off":
            continue
        place = {key: row[key] for key in ("seed", "dataset", "method", "split")}
        cell = found.setdefault(tuple(place.values()), place)
        cell[column] = row["value"]
        if column.endswith(("_accuracy", "_rate")):
            cell |= {f"{column}_{end}": row[end] for end in ("n", "low", "high")}
        if column == "forget_accuracy" and row["n"]:
            cell["below_chance"] = int(below_chance(row["value"] * row["n"], row["n"]))
    return list(found.values())
