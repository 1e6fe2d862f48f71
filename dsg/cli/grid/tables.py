"""The tables of a grid in the terminal: settings by metrics, and what attacks recover."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from dsg.cli.grid.recovery import AREA, COLLATERAL, HALF, SHOWN, UNSHOWN
from dsg.report import method_name

Line = Mapping[str, Any]

_PROTOCOLS = ("cloze", "lm_eval", "dsg", "passages")
_SWEEP = {
    "forget": ("forget", "accuracy"),
    "near": ("near", "accuracy"),
    "retain": ("retain", "accuracy"),
    "align.": ("forget", "alignment"),
    "ppl": ("retain", "perplexity"),
}
_ATTACK = {
    "shown": (SHOWN, "accuracy"),
    "unshown": (UNSHOWN, "accuracy"),
    "retain": ("retain", "accuracy"),
    "area": (SHOWN, AREA),
    "half": (SHOWN, HALF),
    "damage": (UNSHOWN, COLLATERAL),
}


def sweep_table(lines: Sequence[Line]) -> Table:
    """Settings by measurements; accuracies in percent, means over the seeds."""
    title = "Means over seeds; accuracies in %"
    reported = "test" if any(line["split"] == "test" for line in lines) else None
    served = [
        line for line in lines if line["guard"] != "off" and reported in (None, line["split"])
    ]
    return _table(title, "settings", served, ("experiment",), _SWEEP)


def attack_table(lines: Sequence[Line]) -> Table:
    """Attacked methods by what is recovered at the end, with the guard where there is one."""
    title = (
        "After the attacker's best learning rate; accuracies in %; of shown facts the area under "
        "the recovery (0 to 1) and the epochs to half of it; damage: points on facts not shown "
        "that the weights have lost beside the model without unlearning"
    )
    served = [line for line in lines if line["phase"] == "attack" and line["guard"] != "off"]
    return _table(title, "attack", served, ("attack", "method", "mode"), _ATTACK)


def _table(
    title: str,
    first: str,
    lines: Sequence[Line],
    place: Sequence[str],
    columns: Mapping[str, tuple[str, str]],
) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    cells: dict[tuple[Any, ...], dict[tuple[str, str], float]] = {}
    for line in lines:
        if line["protocol"] in _PROTOCOLS:
            row = cells.setdefault(tuple(line[key] for key in place), {})
            row[line["domain"], line["metric"]] = line["mean"]
    shown = {
        name: key for name, key in columns.items() if any(key in row for row in cells.values())
    }
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for key, row in cells.items():
        names = [method_name(part) for part in key if part is not None]
        table.add_row(" ".join(names), *(_number(row.get(at), at[1]) for at in shown.values()))
    return table


def _number(value: float | None, metric: str) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if metric in ("accuracy", COLLATERAL) else f"{value:.2f}"
