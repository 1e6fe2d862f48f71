"""Means over runs, on the scale of what was measured."""

import math
from collections.abc import Sequence

from dsg.evaluation.columns import metric_of
from dsg.intervals import Estimate, mean_interval, safe_exp


def mean_over_runs(metric: str, values: Sequence[float]) -> Estimate:
    """Mean of a metric over independent runs (seeds, draws), with Student's t interval.

    The interval is made on the metric's own scale and does not leave its range.

    Args:
        metric: Its name in the results.
        values: One number per run.

    Raises:
        UserError: There is no value.
    """
    scale = metric_of(metric)
    if scale.is_ratio and all(0 < value < math.inf for value in values):
        mean = mean_interval([math.log(value) for value in values])
        ends = [None if end is None else safe_exp(end) for end in (mean.low, mean.high)]
        value = safe_exp(mean.value)
    else:
        mean = mean_interval(values)
        ends, value = [mean.low, mean.high], mean.value
    low, high = (None if end is None else min(max(end, scale.low), scale.high) for end in ends)
    return Estimate(value, mean.n, low, high)
