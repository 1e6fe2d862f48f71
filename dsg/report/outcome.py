"""What one run has measured, for the terminal: a line per measurement, a column per state."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

Row = Mapping[str, Any]

# What people look for first; a run with more lines than fit shows these.
_METRICS = (
    *("accuracy", "alignment", "mt_bench", "verbmem", "knowmem", "privleak", "forget_quality"),
    *("model_utility", "perplexity", "rouge_l", "trigger_rate", "changed_rate", "density_auroc"),
)
_DOMAINS = ("forget", "forget_shown", "forget_unshown", "near", "other_hazards", "retain")
_OVERALL = (None, "cloze", "lm_eval", "dsg", "passages", "generation", "prediction")
_MAX_LINES = 24
_GUARD = {"none": "no guard", "off": "guard off", "on": "guard on"}


def outcome_table(rows: Sequence[Row]) -> tuple[Table | None, int]:
    """The main measurements of a run with their 95 % intervals and n.

    Of several epochs or requests the first and the last are shown, and a protocol's parts (forms of
    questions, other rules) only where there is no overall number.

    Args:
        rows: Of the run's `results.jsonl`.

    Returns:
        The table, None if nothing was measured; and how many measurements it leaves out.
    """
    rows = _ends(_ends([row for row in rows if row["value"] is not None], "epoch"), "request")
    states = {name: None for name in sorted({_state(row) for row in rows}, key=_state_order)}
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
    for title in _titles(list(states)):
        table.add_column(title, justify="right")
    several = {line[:2] for line in shown if sum(line[:2] == other[:2] for other in shown) > 1}
    for line in shown:
        found = lines[line]
        metric, domain, protocol, _ = line
        suffix = f" ({protocol})" if line[:2] in several and protocol else ""
        counts = sorted({str(row["n"]) for row in found.values() if row["n"] is not None})
        cells = [_cell(found.get(state)) for state in states]
        name = " ".join(str(part) for part in (domain, metric) if part is not None)
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
    order = [*_GUARD].index(guard) if guard in _GUARD else len(_GUARD)
    return str(method), *places, order


def _titles(states: Sequence[tuple[Any, ...]]) -> list[str]:
    """Names of the columns: what does not differ between them goes without saying."""
    methods = {state[0] for state in states}
    titles = []
    for method, request, epoch, guard in states:
        parts = [
            str(method) if len(methods) > 1 else None,
            None if request is None else f"request {request}",
            None if epoch is None else f"epoch {epoch:g}",
            _GUARD.get(guard, guard),
        ]
        titles.append(", ".join(part for part in parts if part))
    return titles


def _line_order(line: tuple[Any, ...]) -> tuple[Any, ...]:
    metric, domain, protocol, split = line
    return (
        _rank(metric, _METRICS),
        protocol not in _OVERALL,
        str(metric),
        _rank(domain, _DOMAINS),
        str(domain),
        str(protocol),
        str(split),
    )


def _rank(name: Any, known: Sequence[str]) -> int:
    return known.index(name) if name in known else len(known)


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    value = f"{row['value']:.3g}"
    if row["low"] is None or row["high"] is None:
        return value
    return rf"{value} \[{row['low']:.3g}, {row['high']:.3g}]"
