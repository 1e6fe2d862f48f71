"""The control of random features: several draws reported as their mean."""

from collections.abc import Iterable, Mapping
from typing import Any

from dsg.evaluation import mean_over_runs

_MEASURED = ("method", "value", "low", "high")


def mean_over_draws(
    rows: Iterable[Mapping[str, Any]], method: str, num_draws: int
) -> list[dict[str, Any]]:
    """One row per measurement, with an interval over the draws.

    Where a draw gave no number, such as an infinite perplexity, there is no mean either; and no row
    at all where a draw is missing.

    Args:
        rows: Result rows of all draws, which differ in `method` alone.
        method: The `method` of their mean.
        num_draws: How many there are.
    """
    by_measurement: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        shared = tuple((key, value) for key, value in row.items() if key not in _MEASURED)
        by_measurement.setdefault(shared, []).append(row)
    means = []
    for drawn in by_measurement.values():
        if len(drawn) < num_draws:
            continue
        values = [row["value"] for row in drawn]
        mean: dict[str, Any] = dict.fromkeys(("value", "low", "high"))
        if None not in values:
            estimate = mean_over_runs(drawn[0]["metric"], values)
            mean = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
        means.append({**drawn[0], "method": method, **mean})
    return means
