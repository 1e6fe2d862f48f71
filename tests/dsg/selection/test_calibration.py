import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsg.errors import UserError
from dsg.selection.calibration import calibrate_threshold, false_positive_rate, wilson


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0, 100))
def test_threshold_is_numpys_percentile(densities, percentile):
    tensor = torch.tensor(densities, dtype=torch.float64)
    assert calibrate_threshold(tensor, percentile) == np.percentile(densities, percentile)


def test_false_positives_are_strictly_above_the_threshold():
    rate = false_positive_rate(torch.tensor([0.1, 0.5, 0.5, 0.9], dtype=torch.float64), 0.5)
    assert (rate.value, rate.n) == (0.25, 4)


def test_wilson_against_the_textbook():
    # Newcombe (1998), table I: 81 of 263, 0.2553 to 0.3662.
    interval = wilson(81, 263)
    assert interval.value == 81 / 263
    assert interval.low == pytest.approx(0.2553, abs=5e-5)
    assert interval.high == pytest.approx(0.3662, abs=5e-5)


@given(st.integers(0, 50), st.integers(1, 50))
def test_wilson_bounds_solve_its_equation(successes, n):
    successes = min(successes, n)
    interval = wilson(successes, n)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    for bound in (interval.low, interval.high):
        spread = 1.959963984540054 * math.sqrt(bound * (1 - bound) / n)
        assert abs(interval.value - bound) == pytest.approx(spread, abs=1e-9)


def test_wilson_without_trials_knows_nothing():
    interval = wilson(0, 0)
    assert math.isnan(interval.value)
    assert (interval.n, interval.low, interval.high) == (0, 0.0, 1.0)


def test_errors():
    with pytest.raises(UserError, match="`successes` must be in"):
        wilson(3, 2)
    with pytest.raises(UserError, match="`densities` must be finite and at least one, got 0"):
        calibrate_threshold(torch.zeros(0))
    with pytest.raises(UserError, match="`threshold_percentile` must be in"):
        calibrate_threshold(torch.zeros(3), 101.0)
