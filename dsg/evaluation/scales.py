"""The values that a metric can take, and means over runs on that scale."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dsg.intervals import Estimate, mean_interval, safe_exp


@dataclass(frozen=True)
class Scale:
    """The range of a metric.

    Attributes:
        low: Lowest value that there is.
        high: Highest value that there is.
        is_ratio: Differences count as factors: means are geometric and intervals those of the
            logarithm.
    """

    low: float = -math.inf
    high: float = math.inf
    is_ratio: bool = False


_SHARE = Scale(0.0, 1.0)
_COUNT = Scale(0.0)
SCALES = {
    "accuracy": _SHARE,
    "alignment": _SHARE,
    "below_chance": _SHARE,
    "correct_probability": _SHARE,
    "trigger_rate": _SHARE,
    "density_auroc": _SHARE,
    "density_tpr_at_5_fpr": _SHARE,
    "density_total_variation": _SHARE,
    "rouge_l": _SHARE,
    "rouge_l_recall": _SHARE,
    "repetition": _SHARE,
    "gibberish_rate": _SHARE,
    "cut_off": _SHARE,
    "min_k_auc": _SHARE,
    "probability": _SHARE,
    "model_utility": _SHARE,
    "forget_quality": _SHARE,
    "ks_statistic": _SHARE,
    "unlearning_score": _SHARE,
    "recovery_area": _SHARE,
    "collateral_damage": Scale(-1.0, 1.0),
    "drift_cosine": Scale(-1.0, 1.0),
    "nll": _COUNT,
    "truth_ratio": _COUNT,
    "epochs_to_half": _COUNT,
    "perplexity": Scale(1.0, is_ratio=True),
    "drift_norm_ratio": Scale(0.0, is_ratio=True),
    "seconds_to_unlearn": Scale(0.0, is_ratio=True),
}


def scale_of(metric: str) -> Scale:
    """The scale of a metric; any number where nothing is known of it."""
    return _SHARE if metric.startswith("chosen_") else SCALES.get(metric, Scale())


def mean_over_runs(metric: str, values: Sequence[float]) -> Estimate:
    """Mean of a metric over independent runs (seeds, draws), with Student's t interval.

    The interval is made on the metric's own scale and does not leave its range.

    Args:
        metric: Its name in the results.
        values: One number per run.

    Raises:
        UserError: There is no value.
    """
    scale = scale_of(metric)
    if scale.is_ratio and all(0 < value < math.inf for value in values):
        mean = mean_interval([math.log(value) for value in values])
        ends = [None if end is None else safe_exp(end) for end in (mean.low, mean.high)]
        value = safe_exp(mean.value)
    else:
        mean = mean_interval(values)
        ends, value = [mean.low, mean.high], mean.value
    low, high = (None if end is None else min(max(end, scale.low), scale.high) for end in ends)
    return Estimate(value, mean.n, low, high)
