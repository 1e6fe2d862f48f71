"""Percentile-bootstrap intervals of any statistic, the same in every run."""

from collections.abc import Callable
from typing import Any

import numpy as np

NUM_RESAMPLES = 1000


def bootstrap(statistic: Callable[..., float], *groups: Any) -> tuple[float | None, float | None]:
    """The 95 % percentile interval of a statistic of one or several samples.

    Args:
        statistic: Takes one array per group, whose first axis counts the items; NaN where the
            resampled items leave it undefined.
        groups: The arrays; each is resampled by itself.

    Returns:
        Both ends; None where no group has a second item.
    """
    arrays = [np.asarray(group, np.float64) for group in groups]
    if all(len(array) < 2 for array in arrays):
        return None, None
    generator = np.random.default_rng(0)
    found = [
        statistic(*(array[generator.integers(len(array), size=len(array))] for array in arrays))
        for _ in range(NUM_RESAMPLES)
    ]
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)
