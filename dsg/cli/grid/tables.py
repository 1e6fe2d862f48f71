"""The tables of a grid in the terminal: settings by metrics, and what attacks recover."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from dsg.evaluation import ATTACKED, COMPARED, PROTOCOLS, Column, method_name, metric_of

Line = Mapping[str, Any]

_SWEPT = ("forget", "near", "retain", "align.", "ppl")


def sweep_table(lines: Sequence[Line]) -> Table:
    """Settings by measurements; accuracies in percent, means over the seeds."""
    title = "Means over seeds; accuracies in %"
    reported = "test" if any(line["split"] == "test" for line in lines) else None
    served = [
        line for line in lines if line["guard"] != "off" and reported in (None, line["split"])
    ]
    columns = [column for column in COMPARED if column.short in _SWEPT]
    return _table(title, "settings", served, ("experiment",), columns)


def attack_table(lines: Sequence[Line]) -> Table:
    """Attacked methods by what is recovered at the end, with the guard where there is one."""
    title = (
        "After the attacker's best learning rate; accuracies in %; of shown facts the area under "
        "the recovery (0 to 1) and the epochs to half of it; damage: points on facts not shown "
        "that the weights have lost beside the model without unlearning"
    )
    served = [line for line in lines if line["phase"] == "attack" and line["guard"] != "off"]
    return _table(title, "attack", served, ("attack", "method", "mode"), ATTACKED)


def _table(
    title: str,
    first: str,
    lines: Sequence[Line],
    place: Sequence[str],
    columns: Sequence[Column],
) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    cells: dict[tuple[Any, ...], dict[tuple[Any, str], float]] = {}
    for line in lines:
        if line["protocol"] in PROTOCOLS:
            row = cells.setdefault(tuple(line[key] for key in place), {})
            row[line["domain"], line["metric"]] = line["mean"]
    places = {(column.domains[0], column.metric): column.short for column in columns}
    shown = [at for at in places if any(at in row for row in cells.values())]
    for at in shown:
        table.add_column(places[at], justify="right", no_wrap=True)
    for key, row in cells.items():
        names = [method_name(part) for part in key if part is not None]
        table.add_row(" ".join(names), *(_number(row.get(at), at[1]) for at in shown))
    return table


def _number(value: float | None, metric: str) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if metric_of(metric).unit == "%" else f"{value:.2f}"
