"""What the model knows without any guard: where that is chance, nothing can be claimed."""

from collections.abc import Iterator

from dsg.evaluation import CHANCE
from dsg.report.measurements import Cell, Measurements


def unguarded_accuracy(measurements: Measurements, domain: str) -> Cell | None:
    """Accuracy of the model that has forgotten nothing, before any attack or request.

    Args:
        measurements: All rows of a run.
        domain: Such as `forget`.
    """
    accuracy = measurements.where(metric="accuracy", domain=domain)
    candidates = (
        accuracy.static().where(method="base"),
        accuracy.where(method="base", epoch=0),
        accuracy.where(request=0),  # no request has been fulfilled yet
    )
    return next((cell for rows in candidates if (cell := _first_cell(rows))), None)


def is_above_chance(cell: Cell) -> bool:
    """Whether an accuracy, or the lower end of its interval, lies above chance."""
    return (cell.value if cell.low is None else cell.low) > CHANCE


def _first_cell(rows: Measurements) -> Cell | None:
    groups: Iterator[Measurements] = (group for _, group in rows.groups())
    return next((cell for group in groups if (cell := group.cell())), None)
