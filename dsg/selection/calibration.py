"""The gate's threshold from densities of retain text, and its false-positive rate."""

import numpy as np
from jaxtyping import Float
from torch import Tensor

from dsg.errors import UserError
from dsg.intervals import Estimate, wilson


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


def false_positive_rate(densities: Float[Tensor, " n"], threshold: float) -> Estimate:
    """Fraction of retain sequences that the gate triggers on, with its Wilson interval.

    Args:
        densities: Densities of retain sequences, in [0, 1].
        threshold: The gate triggers strictly above it.
    """
    return wilson(int((densities.double() > threshold).sum()), densities.numel())
