"""Means over draws of random features, by hand."""

import pytest

from dsg.cli.grid.recovery import mean_over_draws
from dsg.io.results import row


def drawn(metric, values):
    place = {"domain": "retain", "metric": metric, "protocol": "passages", "seed": 0, "n": 8}
    return [row(**place, method=f"random_{i}", value=value) for i, value in enumerate(values)]


def test_one_row_per_measurement_with_an_interval_that_can_be():
    [perplexity, rate] = mean_over_draws(
        [*drawn("perplexity", [2.0, 4.0, 20000.0]), *drawn("trigger_rate", [0.0, 0.01, 0.1])],
        "random",
        3,
    )
    assert (perplexity["method"], perplexity["n"]) == ("random", 8)
    assert perplexity["value"] == pytest.approx(160000 ** (1 / 3))
    assert 1.0 <= perplexity["low"] < 160000 ** (1 / 3) < perplexity["high"]
    assert (rate["value"], rate["low"]) == (pytest.approx(0.11 / 3), 0.0)


def test_a_draw_without_a_number_leaves_no_mean():
    [found] = mean_over_draws(drawn("perplexity", [2.0, float("inf"), 3.0]), "random", 3)
    assert (found["value"], found["low"], found["high"]) == (None, None, None)


def test_a_missing_draw_leaves_no_row():
    assert mean_over_draws(drawn("perplexity", [2.0, 3.0]), "random", 3) == []
