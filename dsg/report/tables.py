"""The main table, methods by measurements, for the page and for the terminal."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from dsg.evaluation import CHANCE, alignment
from dsg.io import read_results
from dsg.report import markup
from dsg.report.known import is_above_chance
from dsg.report.markup import Html
from dsg.report.measurements import (
    Cell,
    Measurements,
    domain_name,
    interval_note,
    method_name,
)


@dataclass(frozen=True)
class Column:
    """One measurement: its heading, metric, and the first of `domains` that has it."""

    title: str
    metric: str
    domains: tuple[str | None, ...]
    is_share: bool = True  # shown in percent


COLUMNS = (
    Column("Forget accuracy", "accuracy", ("forget",)),
    Column("Near-domain accuracy", "accuracy", ("near",)),
    Column("Other-hazards accuracy", "accuracy", ("other_hazards",)),
    Column("Retain accuracy", "accuracy", ("retain",)),
    Column("Alignment", "alignment", ("forget", "retain", None), is_share=False),
    Column("Forget perplexity", "perplexity", ("forget",), is_share=False),
    Column("Retain perplexity", "perplexity", ("retain",), is_share=False),
    Column("Forget ROUGE-L", "rouge_l", ("forget",), is_share=False),
    Column("Retain ROUGE-L", "rouge_l", ("retain",), is_share=False),
    Column("Gate true positives (forget)", "trigger_rate", ("forget",)),
    Column("Gate false positives (retain)", "trigger_rate", ("retain",)),
    Column("Gate false positives (near)", "trigger_rate", ("near",)),
    Column("Gate triggers (other hazards)", "trigger_rate", ("other_hazards",)),
    Column("Density AUROC", "density_auroc", ("forget", "retain", None), is_share=False),
)
_FORGET_ACCURACY = 0  # its place among the columns
_TERMINAL_COLUMNS = {
    "Forget accuracy": "forget",
    "Near-domain accuracy": "near",
    "Retain accuracy": "retain",
    "Alignment": "align.",
    "Forget perplexity": "forget\nppl",
    "Retain perplexity": "ppl",
    "Forget ROUGE-L": "forget\nR-L",
    "Retain ROUGE-L": "retain\nR-L",
    "Gate true positives (forget)": "TPR",
    "Gate false positives (retain)": "FPR",
    "Density AUROC": "AUROC",
}
_ABOUT_ACCURACY = (
    f" Chance is {CHANCE:.0%}; ▼ marks accuracy below chance (one-sided test at 5%), which is "
    "avoidance, not forgetting; the single seeds and data sets below chance are counted. "
    "Alignment: chance-corrected retain accuracy kept × forget accuracy lost, both relative to no "
    "unlearning; none where that is at chance."
)
# Where there are questions they say more, and a terminal is narrow.
_WITHOUT_QUESTIONS = ("Forget perplexity", "Forget ROUGE-L", "Retain ROUGE-L")


def main_cells(group: Measurements) -> dict[str, list[Cell | None]]:
    """Method -> one cell per entry of `COLUMNS`, guard on where there is one."""
    static = group.static().excluding(guard="off")
    return {method: _method_cells(static, method) for method in static.distinct("method")}


def main_tables(measurements: Measurements) -> Html:
    """One HTML table per model and dataset; columns without any number are left out."""
    return markup.join(_tables(measurements))


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
    shown = [
        index
        for index, column in enumerate(COLUMNS)
        if column.title in _TERMINAL_COLUMNS
        and not (has_questions and column.title in _WITHOUT_QUESTIONS)
        and any(cells[index] for _, methods in groups for cells in methods.values())
    ]
    forget = (cells[_FORGET_ACCURACY] for _, methods in groups for cells in methods.values())
    with_runs = any(cell is not None and cell.num_runs > 1 for cell in forget)
    table.add_column("method", overflow="fold")
    for index in shown:
        table.add_column(_TERMINAL_COLUMNS[COLUMNS[index].title], justify="right", no_wrap=True)
        if with_runs and index == _FORGET_ACCURACY:
            table.add_column("runs<", justify="right", no_wrap=True)
    for title, methods in groups:
        if len(groups) > 1:
            table.add_section()
            table.add_row(f"[bold]{escape(title)}[/bold]")
        for name, cells in methods.items():
            numbers = []
            for index in shown:
                cell = cells[index]
                numbers.append(_short(cell, COLUMNS[index]))
                if with_runs and index == _FORGET_ACCURACY:
                    numbers.append(f"{cell.num_below_chance}/{cell.num_runs}" if cell else "–")
            table.add_row(method_name(name), *numbers)
    return table


def table_cell(cell: Cell | None, metric: str) -> Html:
    """A measurement, accuracy in percent, with interval, n and the below-chance flag."""
    return _full(cell, Column("", metric, (), is_share=metric == "accuracy"))


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * share:.1f}%"


def _method_cells(static: Measurements, method: str) -> list[Cell | None]:
    rows = static.where(method=method)
    cells: list[Cell | None] = []
    for column in COLUMNS:
        candidates = (rows.cell(metric=column.metric, domain=domain) for domain in column.domains)
        cells.append(next((cell for cell in candidates if cell), None))
    index = next(i for i, column in enumerate(COLUMNS) if column.metric == "alignment")
    cells[index] = _alignment(static, rows, cells[index])
    return cells


def _alignment(static: Measurements, rows: Measurements, measured: Cell | None) -> Cell | None:
    """Alignment as measured, or else from the table's own accuracies.

    Beside a model at chance there is none: whatever did nothing would score.
    """
    base = static.where(method="base")
    known = (base.cell(metric="accuracy", domain=domain) for domain in ("retain", "forget"))
    if any(cell is not None and not is_above_chance(cell) for cell in known):
        return None
    if measured is not None:
        return measured
    accuracies = [
        source.cell(metric="accuracy", domain=domain)
        for source in (rows, base)
        for domain in ("retain", "forget")
    ]
    if any(cell is None for cell in accuracies):
        return None
    return Cell(alignment(*(cell.value for cell in accuracies if cell)))


def _tables(measurements: Measurements) -> Iterator[Html]:
    for title, group in measurements.comparisons():
        cells = main_cells(group)
        shown = [i for i in range(len(COLUMNS)) if any(row[i] for row in cells.values())]
        if not shown:
            continue
        num_seeds = max(cell.num_seeds for row in cells.values() for cell in row if cell)
        only_validation = group.static().distinct("split") == ["validation"]
        about = _ABOUT_ACCURACY * bool(group.where(metric="accuracy").rows)
        caption = (
            f"{title + '. ' if title else ''}"
            f"{'Validation facts only, on which settings may have been chosen. ' * only_validation}"
            f"{interval_note(num_seeds)} n: questions or passages per seed; a fact that is asked "
            f"in several wordings, or by several data sets, counts once.{about}"
        )
        rows = (
            [method_name(method), *(_full(row[i], COLUMNS[i]) for i in shown)]
            for method, row in cells.items()
        )
        yield markup.table(caption, ["Method", *(COLUMNS[i].title for i in shown)], rows)
        yield _every_domain(group)


def _every_domain(group: Measurements) -> Html:
    """Accuracy by domain and form of question, folded away."""
    accuracy = group.static().excluding(guard="off").where(metric="accuracy")
    methods = accuracy.distinct("method")
    rows = []
    for domain in accuracy.distinct("domain"):
        for protocol in accuracy.where(domain=domain).distinct("protocol"):
            found = accuracy.where(domain=domain, protocol=protocol)
            cells = [found.where(method=method).cell() for method in methods]
            rows.append(
                [
                    domain_name(domain),
                    protocol.replace("_", ", "),
                    *(table_cell(cell, "accuracy") for cell in cells),
                ]
            )
    if not rows:
        return Html("")
    headers = ["Domain", "Questions", *(method_name(method) for method in methods)]
    return markup.element(
        "details",
        markup.element("summary", "Accuracy in every domain and form of question"),
        markup.table("cloze = statements and questions together", headers, rows),
    )


def _full(cell: Cell | None, column: Column) -> Html:
    if cell is None:
        return markup.to_html("–")
    lines = [markup.element("span", _number(cell.value, column), class_="number")]
    if cell.below_chance:
        flag = markup.element(
            "span", "▼", class_="flag", title="below chance", role="img", aria_label="below chance"
        )
        lines.append(markup.join([" ", flag]))
    if cell.low is not None and cell.high is not None:
        scale, digits = (100, 1) if column.is_share else (1, _digits(cell.value))
        ends = f"[{scale * cell.low:.{digits}f}, {scale * cell.high:.{digits}f}]"
        lines.append(markup.element("small", ends))
    if cell.num_below_chance:
        told = f"below chance in {cell.num_below_chance} of {cell.num_runs}"
        lines.append(markup.element("small", told))
    if cell.n is not None:
        lines.append(markup.element("small", f"n = {cell.n}"))
    return markup.join(lines)


def _short(cell: Cell | None, column: Column) -> str:
    if cell is None:
        return "–"
    number = f"{100 * cell.value:.1f}" if column.is_share else _number(cell.value, column)
    return f"<{number}" if cell.below_chance else number


def _number(value: float, column: Column) -> str:
    return percent(value) if column.is_share else f"{value:.{_digits(value)}f}"


def _digits(value: float) -> int:
    return 3 if value < 1.0005 else 2 if value < 100 else 0
