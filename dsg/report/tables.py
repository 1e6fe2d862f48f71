"""Methods by measurements, for the page and the terminal, and one run's own numbers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from dsg.evaluation import (
    COMPARED,
    DOMAINS,
    METRICS,
    PROTOCOLS,
    Column,
    alignment,
    method_name,
    metric_of,
)
from dsg.io import read_results
from dsg.report.measurements import Cell, Measurements, percent

Row = Mapping[str, Any]

_FORGET_ACCURACY = COMPARED[0]
# Where there are questions they say more, and a terminal is narrow.
_WITHOUT_QUESTIONS = ("Forget perplexity", "Forget ROUGE-L", "Retain ROUGE-L")

_OVERALL = (None, *PROTOCOLS)
_MAX_LINES = 24
_GUARD = {"none": "no guard", "off": "guard off", "on": "guard on"}


@dataclass(frozen=True)
class Comparison:
    """One table of a page: methods side by side.

    Attributes:
        title: Model and data set, where they are named.
        columns: Measurements that any method has.
        cells: Method -> one cell per column.
        num_seeds: The largest number of runs behind a cell.
        only_validation: Whether settings may have been chosen on these very facts.
        methods: Methods whose accuracy was measured.
        details: Domain and form of question with an accuracy of each of them.
    """

    title: str
    columns: list[Column]
    cells: dict[str, list[Cell | None]]
    num_seeds: int
    only_validation: bool
    methods: list[str]
    details: list[tuple[str, str, list[Cell | None]]]


def compare_methods(measurements: Measurements) -> list[Comparison]:
    """One comparison per model and data set, and one of their means."""
    comparisons = []
    for title, group in measurements.comparisons():
        cells = main_cells(group)
        columns = [column for column in COMPARED if any(row[column] for row in cells.values())]
        if not columns:
            continue
        accuracy = group.static().excluding(guard="off").where(metric="accuracy")
        comparisons.append(
            Comparison(
                title,
                columns,
                {method: [row[column] for column in columns] for method, row in cells.items()},
                max(cell.num_seeds for row in cells.values() for cell in row.values() if cell),
                group.static().distinct("split") == ["validation"],
                accuracy.distinct("method"),
                list(_every_domain(accuracy)),
            )
        )
    return comparisons


def main_cells(group: Measurements) -> dict[str, dict[Column, Cell | None]]:
    """Method -> a cell for each of `COMPARED`, guard on where there is one."""
    static = group.static().excluding(guard="off")
    cells = {}
    for method in static.distinct("method"):
        rows = static.where(method=method)
        cells[method] = {column: _first_cell(rows, column) for column in COMPARED}
        for column in COMPARED:
            if column.metric == "alignment":
                cells[method][column] = _alignment(static, rows, cells[method][column])
    return cells


def results_table(run_dir: str | Path) -> Table:
    """The main table of a run for the terminal; the caller prints it with rich.

    Rates are in percent, without intervals; `<` marks accuracy below chance. Where there are
    several seeds or data sets, `runs<` counts those in which forget accuracy is below chance.
    """
    measurements = Measurements(read_results(run_dir))
    has_questions = bool(measurements.where(metric="accuracy").rows)
    accuracy = "Accuracy in %; < is below chance: avoidance, not forgetting"
    title = accuracy if has_questions else "Gate rates (TPR, FPR) in %"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    groups = [(title, main_cells(group)) for title, group in measurements.comparisons()]
    rows = [row for _, methods in groups for row in methods.values()]
    shown = [
        column
        for column in COMPARED
        if column.short
        and not (has_questions and column.title in _WITHOUT_QUESTIONS)
        and any(row[column] for row in rows)
    ]
    with_runs = any((cell := row[_FORGET_ACCURACY]) and cell.num_runs > 1 for row in rows)
    table.add_column("method", overflow="fold")
    for column in shown:
        table.add_column(column.short, justify="right", no_wrap=True)
        if with_runs and column == _FORGET_ACCURACY:
            table.add_column("runs<", justify="right", no_wrap=True)
    for title, methods in groups:
        if len(groups) > 1:
            table.add_section()
            table.add_row(f"[bold]{escape(title)}[/bold]")
        for name, row in methods.items():
            numbers = []
            for column in shown:
                cell = row[column]
                numbers.append(_short(cell, column.metric))
                if with_runs and column == _FORGET_ACCURACY:
                    numbers.append(f"{cell.num_below_chance}/{cell.num_runs}" if cell else "–")
            table.add_row(method_name(name), *numbers)
    return table


def number(value: float, metric: str) -> str:
    """A value as pages write it: shares that are read in percent in percent."""
    return percent(value) if metric_of(metric).unit == "%" else f"{value:.{_digits(value)}f}"


def interval(cell: Cell, metric: str) -> str:
    """The interval of a cell in brackets; empty where there is none."""
    if cell.low is None or cell.high is None:
        return ""
    in_percent = metric_of(metric).unit == "%"
    scale, digits = (100, 1) if in_percent else (1, _digits(cell.value))
    return f"[{scale * cell.low:.{digits}f}, {scale * cell.high:.{digits}f}]"


def _first_cell(rows: Measurements, column: Column) -> Cell | None:
    cells = (rows.cell(metric=column.metric, domain=domain) for domain in column.domains)
    return next(filter(None, cells), None)


def _alignment(static: Measurements, rows: Measurements, measured: Cell | None) -> Cell | None:
    """Alignment as measured, or else from the table's own accuracies.

    Beside a model at chance there is none: whatever did nothing would score.
    """
    base = static.where(method="base")
    accuracies = [
        source.cell(metric="accuracy", domain=domain)
        for source in (rows, base)
        for domain in ("retain", "forget")
    ]
    if any(cell is not None and not cell.is_above_chance for cell in accuracies[2:]):
        return None
    if measured is not None:
        return measured
    values = [cell.value for cell in accuracies if cell is not None]
    return Cell(alignment(*values)) if len(values) == len(accuracies) else None


def _every_domain(accuracy: Measurements) -> Iterator[tuple[str, str, list[Cell | None]]]:
    methods = accuracy.distinct("method")
    for domain in accuracy.distinct("domain"):
        for protocol in accuracy.where(domain=domain).distinct("protocol"):
            asked = accuracy.where(domain=domain, protocol=protocol)
            yield domain, protocol, [asked.where(method=method).cell() for method in methods]


def _short(cell: Cell | None, metric: str) -> str:
    if cell is None:
        return "–"
    return "<" * cell.below_chance + number(cell.value, metric).removesuffix("%")


def _digits(value: float) -> int:
    return 3 if value < 1.0005 else 2 if value < 100 else 0


def outcome_table(rows: Sequence[Row]) -> tuple[Table | None, int]:
    """One run's main measurements with their 95 % intervals and n: a column per state.

    Of several epochs or requests the first and the last are shown, and a protocol's parts (forms of
    questions, other rules) only where there is no overall number.

    Args:
        rows: Of the run's `results.jsonl`.

    Returns:
        The table, None if nothing was measured; and how many measurements it leaves out.
    """
    rows = _ends(_ends([row for row in rows if row["value"] is not None], "epoch"), "request")
    states = sorted({_state(row) for row in rows}, key=_state_order)
    lines: dict[tuple[Any, ...], dict[tuple[Any, ...], Row]] = {}
    for row in rows:
        line = (row["metric"], row["domain"], row["protocol"], row["split"])
        lines.setdefault(line, {})[_state(row)] = row
    if not lines:
        return None, 0
    overall = {line[:2] for line in lines if line[2] in _OVERALL}
    whole = [line for line in lines if line[2] in _OVERALL or line[:2] not in overall]
    shown = sorted(whole, key=_line_order)[:_MAX_LINES]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(r"\[95 % intervals]")
    table.add_column("n", justify="right", no_wrap=True)
    several_methods = len({method for method, *_ in states}) > 1
    for state in states:
        table.add_column(_state_title(state, several_methods), justify="right")
    several = {line[:2] for line in shown if sum(line[:2] == other[:2] for other in shown) > 1}
    for line in shown:
        metric, domain, protocol, _ = line
        suffix = f" ({protocol})" if line[:2] in several and protocol else ""
        counts = sorted({str(row["n"]) for row in lines[line].values() if row["n"] is not None})
        name = " ".join(str(part) for part in (domain, metric) if part is not None)
        cells = [_value_and_interval(lines[line].get(state)) for state in states]
        table.add_row(f"{name.replace('_', ' ')}{suffix}", "/".join(counts), *cells)
    return table, len(lines) - len(shown)


def _ends(rows: Sequence[Row], key: str) -> list[Row]:
    """The rows of the first and the last epoch or request, and those of none."""
    places = [row[key] for row in rows if row[key] is not None]
    ends = {None, *((min(places), max(places)) if places else ())}
    return [row for row in rows if row[key] in ends]


def _state(row: Row) -> tuple[Any, ...]:
    return row["method"], row["request"], row["epoch"], row["guard"]


def _state_order(state: tuple[Any, ...]) -> tuple[Any, ...]:
    method, request, epoch, guard = state
    places = (-1 if place is None else place for place in (request, epoch))
    return str(method), *places, _rank(guard, _GUARD)


def _state_title(state: tuple[Any, ...], several_methods: bool) -> str:
    method, request, epoch, guard = state
    parts = [
        str(method) if several_methods else None,
        None if request is None else f"request {request}",
        None if epoch is None else f"epoch {epoch:g}",
        _GUARD.get(guard, guard),
    ]
    return ", ".join(part for part in parts if part)


def _line_order(line: tuple[Any, ...]) -> tuple[Any, ...]:
    metric, domain, protocol, split = line
    return (
        _rank(metric, METRICS),
        protocol not in _OVERALL,
        str(metric),
        _rank(domain, DOMAINS),
        str(domain),
        str(protocol),
        str(split),
    )


def _rank(name: Any, names: Mapping[str, Any]) -> int:
    return [*names].index(name) if name in names else len(names)


def _value_and_interval(row: Row | None) -> str:
    if row is None:
        return "-"
    value = f"{row['value']:.3g}"
    if row["low"] is None or row["high"] is None:
        return value
    return rf"{value} \[{row['low']:.3g}, {row['high']:.3g}]"
