"""Percentile-bootstrap intervals."""

import numpy as np
import pytest

from dsg.intervals import bootstrap


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
