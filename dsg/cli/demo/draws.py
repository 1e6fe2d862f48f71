"""The control of random features: several draws reported as their mean."""

from collections.abc import Iterable, Mapping
from typing import Any

from dsg.evaluation import mean_over_runs


def mean_over_draws(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row of the method `random` per measurement, with an interval over the draws.

    Where a draw gave no number, such as an infinite perplexity, there is no mean either.

    Args:
        rows: Result rows of all draws, which differ in `method` alone.
    """
    measured = ("method", "value", "low", "high")
    by_measurement: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        shared = tuple((key, value) for key, value in row.items() if key not in measured)
        by_measurement.setdefault(shared, []).append(row)
    means = []
    for found in by_measurement.values():
        values = [row["value"] for row in found]
        mean: dict[str, Any] = dict.fromkeys(("value", "low", "high"))
        if None not in values:
            estimate = mean_over_runs(found[0]["metric"], values)
            mean = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
        means.append({**found[0], "method": "random", **mean})
    return means
