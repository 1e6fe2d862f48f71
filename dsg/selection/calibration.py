"""From densities of retain text to a threshold, and how often it errs."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from dsg.errors import UserError

# 0.975 quantile of the standard normal distribution: a 95 % interval.
_Z = 1.959963984540054


@dataclass(frozen=True)
class Proportion:
    """A measured fraction with its 95 % Wilson interval.

    Attributes:
        value: Successes over trials, in [0, 1]; nan without trials.
        n: Number of trials.
        low: Lower bound.
        high: Upper bound.
    """

    value: float
    n: int
    low: float
    high: float


def wilson(successes: float, n: int) -> Proportion:
    """Fraction of successes with its 95 % Wilson score interval.

    Args:
        successes: In [0, n]; a fraction where several answers count as one trial.
        n: Number of trials; without trials the value is nan and the interval [0, 1].

    Raises:
        UserError: If `successes` is not in [0, n].
    """
    if not 0 <= successes <= n:
        raise UserError(f"`successes` must be in [0, n] with n {n}, got {successes}; recount.")
    if n == 0:
        return Proportion(math.nan, 0, 0.0, 1.0)
    p, z2 = successes / n, _Z * _Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At 0 and n successes the bound is exact; rounding would leave it a hair off.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Proportion(p, n, low, high)


def calibrate_threshold(densities: Float[Tensor, " n"], percentile: float = 95.0) -> float:
    """The density that only `100 - percentile` per cent of retain sequences exceed (tau).

    Args:
        densities: Densities of retain sequences that took no part in the selection, in [0, 1].
        percentile: In [0, 100], linear interpolation as in NumPy (p_dyn).

    Raises:
        UserError: If there is no density, one is not finite, or `percentile` is out of range.
    """
    if densities.numel() == 0 or not densities.isfinite().all():
        raise UserError(
            f"`densities` must be finite and at least one, got {densities.numel()} values; "
            "pass more calibration texts."
        )
    if not 0.0 <= percentile <= 100.0:
        raise UserError(
            f"`threshold_percentile` must be in [0, 100], got {percentile}; the paper uses 95."
        )
    return float(np.percentile(densities.double().cpu().numpy(), percentile))


def false_positive_rate(densities: Float[Tensor, " n"], threshold: float) -> Proportion:
    """Fraction of retain sequences that the gate would trigger on.

    Args:
        densities: Densities of retain sequences, in [0, 1].
        threshold: The gate triggers strictly above it.
    """
    return wilson(int((densities.double() > threshold).sum()), densities.numel())
