"""Intervals over runs lie where their metric can lie, whatever was measured."""

import math
import re
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsg.evaluation.columns import METRICS, mean_over_runs, metric_of

T975_2 = 4.302652729911275  # Student's t, 97.5th percentile, 2 degrees of freedom
SOURCES = Path(__file__).parents[3] / "dsg"


def values_of(metric):
    scale = metric_of(metric)
    low, high = max(scale.low, -1e6), min(scale.high, 1e6)
    return st.lists(st.floats(low, high), min_size=2, max_size=6)


@pytest.mark.parametrize("metric", [*METRICS, "chosen_2"])
@given(data=st.data())
def test_no_interval_leaves_the_range_of_its_metric_or_misses_its_mean(metric, data):
    found = mean_over_runs(metric, data.draw(values_of(metric)))
    scale = metric_of(metric)
    assert scale.low <= found.low <= found.high <= scale.high
    slack = 1e-9 * max(1.0, abs(found.value))
    assert found.low - slack <= found.value <= found.high + slack


def test_perplexities_are_averaged_as_losses():
    """A run that broke must not give an interval below 1, nor below 0."""
    values = [2.0, 3.0, 25000.0]
    logs = [math.log(value) for value in values]
    half = T975_2 * statistics.stdev(logs) / 3**0.5
    found = mean_over_runs("perplexity", values)
    assert found.value == pytest.approx(math.exp(statistics.mean(logs)))
    assert found.low == pytest.approx(max(1.0, math.exp(statistics.mean(logs) - half)), rel=1e-3)
    assert found.high == pytest.approx(math.exp(statistics.mean(logs) + half), rel=1e-2)


def test_rates_end_at_0_and_1():
    found = mean_over_runs("trigger_rate", [0.02, 0.0, 0.09])
    assert found.value == pytest.approx(0.11 / 3)
    assert (found.low, found.high < 1) == (0.0, True)


def test_a_single_run_has_no_interval_and_unknown_metrics_any():
    assert mean_over_runs("perplexity", [3.0]).low is None
    assert mean_over_runs("privleak", [-1.0, 1.0]).low < -1


def test_nobody_takes_means_over_runs_without_the_scale():
    users = {
        path.name
        for path in SOURCES.rglob("*.py")
        if re.search(r"\bmean_interval\(", path.read_text(encoding="utf-8"))
    }
    assert users == {"intervals.py", "columns.py"}
