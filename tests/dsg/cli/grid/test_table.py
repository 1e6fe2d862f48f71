"""The tidy table: means and t intervals computed by hand, and what counts as one line."""

import csv
import statistics

import pytest

from dsg.cli.grid.table import table_rows, write_table
from dsg.io.results import row

T975_2 = 4.302652729911275  # Student's t, 97.5th percentile, 2 degrees of freedom


def measured(value, seed, **fields):
    place = {"method": "rmu", "domain": "forget", "metric": "perplexity", "protocol": "passages"}
    return row(**{**place, "value": value, "seed": seed, **fields})


def test_mean_and_interval_over_three_seeds():
    values = [4.0, 5.0, 6.0]
    [line] = table_rows(measured(value, seed, metric="nll") for seed, value in enumerate(values))
    half = T975_2 * statistics.stdev(values) / 3**0.5
    assert (line["mean"], line["n_seeds"]) == (5.0, 3)
    assert line["low"] == pytest.approx(5 - half, abs=1e-3)
    assert line["high"] == pytest.approx(5 + half, abs=1e-3)
    assert line["phase"] == "unlearning"


def test_intervals_of_shares_end_at_0_and_1():
    rows = [measured(value, seed, metric="accuracy") for seed, value in enumerate([0.1, 0.9])]
    [line] = table_rows(rows)
    assert (line["mean"], line["low"], line["high"]) == (0.5, 0.0, 1.0)


def test_an_interval_of_perplexity_is_that_of_the_loss_and_ends_at_1():
    rows = [measured(value, seed, metric="perplexity") for seed, value in enumerate([2.0, 8.0])]
    [line] = table_rows(rows)
    assert (line["mean"], line["low"]) == (pytest.approx(4.0), 1.0)
    # The losses are log 4 - log 2 and log 4 + log 2.
    assert line["high"] == pytest.approx(4 * 2**12.7062, rel=1e-3)


def test_seeds_below_chance_are_counted_one_by_one():
    accuracies = [measured(v, s, metric="accuracy", n=36) for s, v in enumerate([0.1, 0.24, 0.9])]
    [line, other] = table_rows([*accuracies, measured(2.0, 0)])
    assert (line["n_seeds"], line["n_below_chance"]) == (3, 1)
    assert other["n_below_chance"] is None


def test_one_seed_has_no_interval_and_nothing_measured_is_no_seed():
    [line] = table_rows([measured(0.5, 0), measured(None, 1)])
    assert (line["mean"], line["low"], line["high"], line["n_seeds"]) == (0.5, None, None, 1)


def test_the_last_epoch_counts():
    rows = [measured(float(epoch), 0, epoch=epoch, attack="a") for epoch in (0, 2, 1)]
    [line] = table_rows(rows)
    assert (line["phase"], line["epoch"], line["mean"]) == ("attack", 2, 2.0)


def test_lines_differ_in_phase_guard_mode_and_experiment():
    rows = [
        measured(1.0, 0),
        measured(2.0, 0, attack="relearn_full", guard="on", mode="test_time"),
        measured(3.0, 0, attack="relearn_full", guard="off", mode="test_time"),
        measured(4.0, 0, attack="relearn_full", guard="on", mode="train_time"),
        measured(5.0, 0, request=1),
        measured(6.0, 0, experiment="lr=1"),
    ]
    lines = table_rows(rows)
    assert len(lines) == len(rows)
    assert {line["phase"] for line in lines} == {"unlearning", "attack", "sequence"}
    assert sorted(line["mean"] for line in lines) == [1, 2, 3, 4, 5, 6]
    assert table_rows(reversed(rows)) == lines


def test_the_file_is_plain_csv(tmp_path):
    lines = table_rows([measured(0.25, 0)])
    path = write_table(tmp_path / "table.csv", lines)
    with path.open(newline="") as file:
        [found] = csv.DictReader(file)
    assert found["mean"] == "0.25"
    assert found["low"] == found["attack"] == ""
    assert list(found) == list(lines[0])
