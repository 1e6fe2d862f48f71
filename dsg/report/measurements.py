"""Result rows as the report needs them: looked up by key and aggregated over seeds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dsg.evaluation import CHANCE, DOMAINS, METHODS, below_chance, mean_over_runs

Row = Mapping[str, Any]

_FORGET_DOMAINS = ("forget", "forget_shown", "forget_unshown")


@dataclass(frozen=True)
class Cell:
    """One number of a table or chart.

    Attributes:
        value: The measurement, or its mean over seeds.
        low: Lower end of the interval; None if there is none.
        high: Upper end of the interval.
        n: Items per seed; None if unknown.
        num_seeds: Runs behind the value.
        below_chance: An accuracy that lies below chance, all runs together.
        num_below_chance: Runs (one seed, one data set) whose accuracy by itself lies below chance.
        num_runs: Runs in which an accuracy was measured.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    num_seeds: int = 1
    below_chance: bool = False
    num_below_chance: int = 0
    num_runs: int = 0

    @property
    def is_above_chance(self) -> bool:
        """Whether an accuracy, or the lower end of its interval, lies above chance."""
        return (self.value if self.low is None else self.low) > CHANCE

    def overlaps(self, other: "Cell") -> bool | None:
        """Whether two intervals overlap; None where there are not two."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return None
        return max(self.low, other.low) <= min(self.high, other.high)


class Measurements:
    """Rows of `results.jsonl` with selection by key and aggregation over seeds."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = [row for row in rows if row["value"] is not None]

    def where(self, **fields: Any) -> "Measurements":
        """Keep the rows whose keys equal the given values."""
        return Measurements(
            row for row in self.rows if all(row[key] == value for key, value in fields.items())
        )

    def excluding(self, **fields: Any) -> "Measurements":
        """Drop the rows in which any of the keys has the given value."""
        return Measurements(
            row for row in self.rows if all(row[key] != value for key, value in fields.items())
        )

    def distinct(self, key: str) -> list[Any]:
        """Values of a key other than None; methods and domains in the report's own order."""
        order = {name: place for names in (METHODS, DOMAINS) for place, name in enumerate(names)}
        present = {row[key] for row in self.rows} - {None}
        return sorted(present, key=lambda name: (order.get(name, 99), isinstance(name, str), name))

    def static(self) -> "Measurements":
        """Rows without attack and sequential requests; test facts alone where there are any."""
        rows = self.where(attack=None, request=None)
        on_test = rows.excluding(split="validation")
        return on_test if on_test.rows else rows

    def groups(self) -> list[tuple[str, "Measurements"]]:
        """Titled groups that one table may show: one model and dataset each.

        Experiments share a table unless they measure the same cell, as the runs of a grid do.
        """
        groups = []
        for model in _distinct_with_none(self.rows, "model"):
            for dataset in _distinct_with_none(self.rows, "dataset"):
                rows = self.where(model=model, dataset=dataset)
                title = ", ".join(str(part) for part in (model, dataset) if part is not None)
                if not rows.rows:
                    continue
                if not rows._experiments_collide():
                    groups.append((title, rows))
                    continue
                for experiment in _distinct_with_none(rows.rows, "experiment"):
                    name = ", ".join(filter(None, (experiment, title)))
                    groups.append((name, rows.where(experiment=experiment)))
        return groups

    def comparisons(self) -> list[tuple[str, "Measurements"]]:
        """The groups that compare methods; several that ask questions also as their mean."""
        groups = [(title, group.static()) for title, group in self.groups()]
        groups = [(title, group) for title, group in groups if group.distinct("method")]
        datasets = {row["dataset"] for _, group in groups for row in group.rows}
        methods = {tuple(group.distinct("method")) for _, group in groups}
        rows = [row for _, group in groups for row in group.rows]
        asked = any(row["metric"] == "accuracy" for row in rows)
        if asked and len(groups) == len(datasets) > 1 and len(methods) == 1:
            groups.append((f"mean of {len(datasets)} data sets", _mean_over_datasets(rows)))
        return groups

    def cell(self, **fields: Any) -> Cell | None:
        """The measurement with these keys, over all seeds; None if there is none.

        Test facts are preferred over validation facts, the overall protocol over its parts, and
        of several epochs the last counts.
        """
        latest = _latest(self.where(**fields).rows)
        on_test = _preferred(latest, "split", "test")
        by_seed: dict[Any, Row] = {}
        for row in _preferred(on_test, "protocol", "cloze"):
            by_seed.setdefault(row["seed"], row)
        rows = list(by_seed.values())
        if not rows:
            return None
        counts = [row["n"] for row in rows if row["n"] is not None]
        value, low, high = _estimate(rows)
        below = [_runs_below_chance(row) for row in rows]
        return Cell(
            value=value,
            low=low,
            high=high,
            n=min(counts) if counts else None,
            num_seeds=len(rows),
            below_chance=_is_below_chance(rows),
            num_below_chance=sum(count for count, _ in below),
            num_runs=sum(runs for _, runs in below),
        )

    def _experiments_collide(self) -> bool:
        keys = ("method", "guard", "mode", "attack", "epoch", "request", "seed", "domain", "split")
        seen: dict[tuple, str] = {}
        for row in self.rows:
            identity = tuple(row[key] for key in (*keys, "protocol", "metric"))
            if seen.setdefault(identity, row["experiment"]) != row["experiment"]:
                return True
        return False


def _mean_over_datasets(rows: Iterable[Row]) -> Measurements:
    """One row per seed where each data set had one: the mean value of all items together.

    Data sets that are compared differ in what is to be forgotten and share their other questions,
    which therefore count once. `runs` tells how many of the rows lie below chance.
    """
    averaged = ("dataset", "value", "n", "low", "high")
    alike: dict[tuple, list[Row]] = {}
    for row in rows:
        alike.setdefault(tuple((k, v) for k, v in row.items() if k not in averaged), []).append(row)
    means = []
    for group in alike.values():
        counts = [row["n"] for row in group]
        together = sum if group[0]["domain"] in _FORGET_DOMAINS else max
        mean = {
            "value": sum(row["value"] for row in group) / len(group),
            "n": None if None in counts else together(counts),
            "runs": tuple(map(sum, zip(*map(_runs_below_chance, group), strict=True))),
        }
        means.append({**group[0], "dataset": None, "low": None, "high": None, **mean})
    return Measurements(means)


def unguarded_accuracy(measurements: Measurements, domain: str) -> Cell | None:
    """Accuracy of the model that has forgotten nothing, before any attack or request."""
    accuracy = measurements.where(metric="accuracy", domain=domain)
    candidates = (
        accuracy.static().where(method="base"),
        accuracy.where(method="base", epoch=0),
        accuracy.where(request=0),  # no request has been fulfilled yet
    )
    cells = (group.cell() for rows in candidates for _, group in rows.groups())
    return next(filter(None, cells), None)


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * share:.1f}%"


def interval_note(num_seeds: int) -> str:
    """What the brackets mean for this many seeds."""
    if num_seeds == 1:
        return "One seed. Brackets: 95% interval of that run."
    if num_seeds == 2:
        return "Mean of 2 seeds. Brackets: the two seeds (too few for an interval)."
    return f"Mean of {num_seeds} seeds. Brackets: 95% Student t interval over seeds."


def _estimate(rows: list[Row]) -> tuple[float, float | None, float | None]:
    """Value and interval of one run, or those over the runs."""
    values = [row["value"] for row in rows]
    estimate = mean_over_runs(rows[0]["metric"], values)
    if len(rows) == 1:
        return estimate.value, rows[0]["low"], rows[0]["high"]
    if len(rows) == 2:
        return estimate.value, min(values), max(values)
    return estimate.value, estimate.low, estimate.high


def _is_below_chance(rows: list[Row]) -> bool:
    if rows[0]["metric"] != "accuracy" or any(not row["n"] for row in rows):
        return False
    total = sum(row["n"] for row in rows)
    return below_chance(sum(row["value"] * row["n"] for row in rows), total, CHANCE)


def _runs_below_chance(row: Row) -> tuple[int, int]:
    """How many accuracies a row stands for that lie below chance by themselves, and how many."""
    if row["metric"] != "accuracy" or not row["n"]:
        return 0, 0
    return row.get("runs") or (int(_is_below_chance([row])), 1)


def _latest(rows: list[Row]) -> list[Row]:
    """Rows without an epoch, or else those of the last one."""
    epochs = {row["epoch"] for row in rows}
    last = None if None in epochs else max(epochs, default=None)
    return [row for row in rows if row["epoch"] == last]


def _preferred(rows: list[Row], key: str, first: str) -> list[Row]:
    """The rows with one value of a key: the preferred one, else none, else the first by name."""
    present = {row[key] for row in rows}
    ordered = (first, None, *sorted(present - {None}))
    chosen = next((value for value in ordered if value in present), None)
    return [row for row in rows if row[key] == chosen]


def _distinct_with_none(rows: list[Row], key: str) -> list[str | None]:
    return sorted({row[key] for row in rows}, key=lambda name: (name is not None, str(name)))
