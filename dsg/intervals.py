"""A number and its 95 % interval: shares, means of items or runs, and any statistic of samples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsg.errors import UserError

NUM_RESAMPLES = 1000
Z95 = 1.959963984540054  # 0.975 quantile of the standard normal distribution


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: The number; nan for a share of no trials.
        n: Items, trials or runs behind it.
        low: Lower end of the interval; None where a single item allows none.
        high: Upper end.
    """

    value: float
    n: int
    low: float | None
    high: float | None


def wilson(successes: float, n: int) -> Estimate:
    """Fraction of successes with its 95 % Wilson score interval.

    Args:
        successes: In [0, n]; a fraction where several answers count as one trial.
        n: Number of trials; without trials the value is nan and the interval [0, 1].

    Raises:
        UserError: If `successes` is not in [0, n].
    """
    if not 0 <= successes <= n:
        raise UserError(f"`successes` must be in [0, n] with n {n}, got {successes}; recount.")
    return Estimate(successes / n if n else math.nan, n, *wilson_ends(successes, n))


def wilson_ends(successes: float, n: int) -> tuple[float, float]:
    """Both ends of the interval of `wilson`."""
    if n == 0:
        return 0.0, 1.0
    # Written out, because scipy's takes whole successes only.
    p, z2 = successes / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At 0 and n successes the bound is exact; rounding would leave it a hair off.
    return (
        0.0 if successes == 0 else centre - half,
        1.0 if successes == n else centre + half,
    )


def mean_interval(
    values: Sequence[float],
    *,
    low: float = -math.inf,
    high: float = math.inf,
    is_ratio: bool = False,
) -> Estimate:
    """Mean over independent runs (seeds) with Student's t interval; no interval for one run.

    Args:
        values: One number per run.
        low: Lowest number that there is; the interval does not leave the range.
        high: Highest number that there is.
        is_ratio: Differences count as factors: the mean is geometric and the interval that of the
            logarithm, where all numbers are positive and finite.

    Raises:
        UserError: There is no value.
    """
    numbers, back = _checked(values, "seeds"), float
    if is_ratio and ((numbers > 0) & (numbers < math.inf)).all():
        numbers, back = np.array([math.log(value) for value in values]), safe_exp
    mean, n = float(numbers.mean()), numbers.size
    if n == 1:
        return Estimate(back(mean), 1, None, None)
    from scipy.special import stdtrit  # what scipy.stats.t.ppf calls, and four times faster to load

    half = float(stdtrit(n - 1, 0.975) * numbers.std(ddof=1)) / math.sqrt(n)
    ends = (min(max(back(end), low), high) for end in (mean - half, mean + half))
    return Estimate(back(mean), n, *ends)


def bootstrap_mean(values: Sequence[float]) -> Estimate:
    """Mean over items with a percentile-bootstrap interval; no interval for one item.

    Raises:
        UserError: There is no value.
    """
    numbers = _checked(values, "items")
    low, high = bootstrap(np.mean, numbers)
    return Estimate(math.fsum(numbers) / numbers.size, numbers.size, low, high)


def bootstrap(statistic: Callable[..., float], *groups: Any) -> tuple[float | None, float | None]:
    """The 95 % percentile interval of a statistic of samples, the same in every run.

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
    resampled = [
        statistic(*(array[generator.integers(len(array), size=len(array))] for array in arrays))
        for _ in range(NUM_RESAMPLES)
    ]
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def safe_exp(logarithm: float) -> float:
    """The exponential; infinite where it is too large for a float."""
    return math.exp(logarithm) if logarithm < 709 else math.inf


def _checked(values: Sequence[float], what: str) -> np.ndarray:
    numbers = np.asarray(values, np.float64)
    if numbers.size == 0:
        raise UserError(f"`values` must hold at least one number, got none; check the {what}.")
    return numbers
