"""Sentences of the report, and the numbers in them."""

from dataclasses import dataclass
from typing import Literal

from dsg.report.measurements import Cell
from dsg.report.tables import percent


@dataclass(frozen=True)
class Finding:
    """A sentence, and what it is: for the guard, against it, or a caution about reading."""

    text: str
    side: Literal["for", "against", "caution"]


def side(against: bool) -> Literal["for", "against"]:
    """Which side a sentence is on."""
    return "against" if against else "for"


def with_interval(cell: Cell) -> str:
    """A share in percent with its interval, where there is one."""
    if cell.low is None or cell.high is None:
        return percent(cell.value)
    return f"{percent(cell.value)} [{100 * cell.low:.1f}, {100 * cell.high:.1f}]"


def overlap_note(first: Cell, second: Cell) -> str:
    """A remark where two intervals overlap."""
    ends = (first.low, first.high, second.low, second.high)
    if any(end is None for end in ends):
        return ""
    low, high = max(first.low, second.low), min(first.high, second.high)  # pyright: ignore
    return " (the intervals overlap)" if low <= high else ""
