"""Tests between two runs on the same items.

Both runs met the same questions, and most of what makes a question hard is the same for both. A
paired test removes it; comparing two intervals does not.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dsg.errors import UserError
from dsg.intervals import wilson_ends

NUM_RESAMPLES = 10_000
EXACT_UP_TO = 12  # items: all 2 ** 12 signs are fewer than the random ones

_CELLS = 2_000_000  # of a block of resamples, which bounds its memory


@dataclass(frozen=True)
class PairedTest:
    """How a second run differs from a first one on the same items.

    Attributes:
        first: Mean of the first run.
        second: Mean of the second run.
        difference: `second - first`.
        low: Lower end of the difference's 95 % interval; None for a single item.
        high: Upper end of it.
        p: Two-sided p value of no difference.
        n: Items.
        test: `mcnemar` or `sign_flip`.
    """

    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    p: float
    n: int
    test: Literal["mcnemar", "sign_flip"]


def compare_values(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """`mcnemar` for values that are all 0 or 1, else `sign_flip`."""
    binary = set(first) | set(second) <= {0.0, 1.0}
    return (mcnemar if binary else sign_flip)(first, second)


def mcnemar(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Exact McNemar test of two runs' right and wrong answers.

    Only the items on which the runs disagree tell them apart: without a difference the second run
    wins each of them with probability 1/2 (exact binomial test). The interval is Newcombe's square
    and add interval for paired proportions (1998, his method 10), which joins the two Wilson
    intervals and their correlation.

    Args:
        first: 0 or 1 per item.
        second: The other run's, in the same order.

    Raises:
        UserError: The runs differ in length, are empty, or hold another value.
    """
    a, b = _pair(first, second)
    if not np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        raise UserError("`first` and `second` must hold 0 or 1 only; use sign_flip.")
    from scipy.stats import binomtest  # here, because it takes half a second

    won, lost = int((b > a).sum()), int((a > b).sum())
    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    n = len(a)
    before, after, difference = int(a.sum()) / n, int(b.sum()) / n, (won - lost) / n
    (before_low, before_high), (after_low, after_high) = (
        wilson_ends(int(outcomes.sum()), n) for outcomes in (a, b)
    )
    phi = _correlation(int((a * b).sum()), lost, won, n)

    def distance(gap: float, other_gap: float) -> float:
        return math.sqrt(max(0.0, gap**2 - 2 * phi * gap * other_gap + other_gap**2))

    low = difference - distance(after - after_low, before_high - before)
    high = difference + distance(after_high - after, before - before_low)
    return PairedTest(before, after, difference, low, high, p, n, "mcnemar")


def sign_flip(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Permutation test of the mean difference.

    Without a difference each item's values could as well have come from the other run: the p value
    is the share of sign patterns under which the mean difference is at least as large (all of
    them up to 12 items, else 10,000 random ones and the observed one). The interval is the
    percentile bootstrap over items.

    Args:
        first: A number per item, none NaN.
        second: The other run's, in the same order.

    Raises:
        UserError: The runs differ in length or are empty, or a value is NaN.
    """
    a, b = _pair(first, second)
    gaps = b - a
    generator = np.random.default_rng(0)  # the same in every run
    low = high = None
    if len(gaps) > 1:
        drawn = _resample(
            len(gaps),
            lambda shape: gaps[generator.integers(len(gaps), size=shape)].mean(1),
        )
        low, high = map(float, np.percentile(drawn, [2.5, 97.5]))
    p = _sign_flip_p(gaps, generator)
    means = float(a.mean()), float(b.mean())
    return PairedTest(*means, float(gaps.mean()), low, high, p, len(gaps), "sign_flip")


def _sign_flip_p(gaps: np.ndarray, generator: np.random.Generator) -> float:
    n = len(gaps)
    # Sums of the same numbers in another order differ by rounding, which must count as a tie.
    observed = abs(gaps.sum()) - 1e-12 * np.abs(gaps).sum()
    if n <= EXACT_UP_TO:
        patterns = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float((np.abs((2.0 * patterns - 1) @ gaps) >= observed).mean())
    flipped = _resample(n, lambda shape: (2.0 * generator.integers(2, size=shape) - 1) @ gaps)
    return float((1 + (np.abs(flipped) >= observed).sum()) / (1 + len(flipped)))


def _resample(n: int, draw: Callable[[tuple[int, int]], np.ndarray]) -> np.ndarray:
    """`NUM_RESAMPLES` values, made in blocks."""
    rows = max(1, _CELLS // n)
    sizes = [min(rows, NUM_RESAMPLES - done) for done in range(0, NUM_RESAMPLES, rows)]
    return np.concatenate([draw((size, n)) for size in sizes])


def _correlation(both: int, first_only: int, second_only: int, n: int) -> float:
    """Phi of the two runs' outcomes, with Newcombe's correction where it is positive."""
    neither = n - both - first_only - second_only
    margins = (both + first_only) * (second_only + neither)
    margins *= (both + second_only) * (first_only + neither)
    if margins == 0:
        return 0.0
    cross = both * neither - first_only * second_only
    corrected = max(cross - n / 2, 0.0) if cross > 0 else float(cross)
    return corrected / math.sqrt(margins)


def _pair(first: Sequence[float], second: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape or a.size == 0 or np.isnan([a, b]).any():
        raise UserError(
            f"`first` and `second` must hold one number per item and no NaN, got {a.size} and "
            f"{b.size} with {int(np.isnan(a).sum() + np.isnan(b).sum())} NaN; pair them first."
        )
    return a, b
