"""Intervals of shares, means and other statistics, against scipy and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp

from dsg.errors import UserError
from dsg.intervals import bootstrap, bootstrap_mean, mean_interval, wilson


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


@given(st.integers(0, 50), st.integers(1, 50))
def test_wilson_is_that_of_scipy(successes, n):
    successes = min(successes, n)
    reference = binomtest(successes, n).proportion_ci(method="wilson")
    interval = wilson(successes, n)
    assert (interval.low, interval.high) == pytest.approx(tuple(reference), abs=1e-12)


def test_wilson_without_trials_knows_nothing():
    interval = wilson(0, 0)
    assert math.isnan(interval.value)
    assert (interval.n, interval.low, interval.high) == (0, 0.0, 1.0)


def test_wilson_refuses_more_successes_than_trials():
    with pytest.raises(UserError, match="`successes` must be in"):
        wilson(3, 2)


def test_mean_interval_by_hand():
    # Mean 2, standard deviation 1, t(2) = 4.3027.
    estimate = mean_interval([1.0, 2.0, 3.0])
    assert (estimate.value, estimate.n) == (2.0, 3)
    assert estimate.high - 2.0 == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert mean_interval([0.5]).low is None
    with pytest.raises(UserError, match="at least one number"):
        mean_interval([])


@pytest.mark.parametrize("degrees", [1, 2, 5, 10, 11, 30, 31, 100])
def test_the_interval_of_a_mean_is_students(degrees):
    values = np.random.default_rng(degrees).normal(size=degrees + 1)
    reference = ttest_1samp(values, 0.0).confidence_interval(0.95)
    estimate = mean_interval(values.tolist())
    assert (estimate.low, estimate.high) == pytest.approx(tuple(reference), rel=1e-12)


def test_interval_of_a_mean_is_that_of_the_central_limit_theorem():
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    low, high = bootstrap(np.mean, values)
    error = values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_groups_are_resampled_by_themselves_and_whole_rows_are_drawn():
    seen = []

    def statistic(first, second):
        seen.append((first.shape, second.shape))
        assert (first[:, 1] == 10 * first[:, 0]).all()
        return first[:, 0].mean() - second.mean()

    first = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    low, high = bootstrap(statistic, first, np.array([5.0, 5.0]))
    assert set(seen) == {((3, 2), (2,))}
    assert (low, high) == (-4.0, -2.0)


def test_it_is_the_same_in_every_run_and_has_no_interval_for_one_item():
    assert bootstrap(np.mean, [1.0, 2.0, 5.0]) == bootstrap(np.mean, [1.0, 2.0, 5.0])
    assert bootstrap(np.mean, [1.0]) == (None, None)


def test_the_mean_over_items_has_the_bootstraps_interval():
    values = [1.0, 2.0, 5.0]
    estimate = bootstrap_mean(values)
    assert (estimate.value, estimate.n) == (pytest.approx(8 / 3), 3)
    assert (estimate.low, estimate.high) == bootstrap(np.mean, values)
    with pytest.raises(UserError, match="check the items"):
        bootstrap_mean([])
