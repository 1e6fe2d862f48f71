"""`report.json`, and the tidy table: means and t intervals by hand, what counts as one line."""

import csv
import json
import statistics

import pytest

from dsg.errors import UserError
from dsg.io.results import row, write_results
from dsg.report import build_report
from dsg.report.files import Densities, read_drawn, table_rows, write_drawn, write_table
from tests.report_data import write_run

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
    lines = write_table(tmp_path, [measured(0.25, 0)])
    with (tmp_path / "table.csv").open(newline="") as file:
        [read] = csv.DictReader(file)
    assert read["mean"] == "0.25"
    assert read["low"] == read["attack"] == ""
    assert list(read) == list(lines[0])


def test_the_report_keeps_times_that_are_no_results(tmp_path):
    write_results(tmp_path, [measured(2.0, 0)])
    times = [row(method="rmu", metric="seconds_to_unlearn", value=12.5, seed=0)]
    write_drawn(tmp_path, times=times)
    build_report(tmp_path)
    with (tmp_path / "table.csv").open(newline="") as file:
        means = {line["metric"]: line["mean"] for line in csv.DictReader(file)}
    assert means == {"perplexity": "2.0", "seconds_to_unlearn": "12.5"}


def test_parts_come_back_as_written(tmp_path):
    write_run(tmp_path)
    drawn = read_drawn(tmp_path)
    assert drawn.densities["dsg"].threshold == 0.19
    assert len(drawn.densities["dsg"].domains["retain"]) == 720
    assert [feature["feature_id"] for feature in drawn.features] == [17, 403]
    assert drawn.features[0]["contexts"][1]["token"] == "Morvex"
    assert drawn.settings[0].chosen["clamp_value"] == -20.0


def test_numbers_are_rounded_and_other_parts_stay(tmp_path):
    write_drawn(tmp_path, attempts=[{"lr": 0.1}])
    write_drawn(tmp_path, densities={"dsg": Densities(1 / 3, {"forget": [1 / 3, 0.5]})})
    drawn = read_drawn(tmp_path)
    assert drawn.densities == {"dsg": Densities(0.333333, {"forget": [0.333333, 0.5]})}
    assert json.loads((tmp_path / "report.json").read_text())["attempts"] == [{"lr": 0.1}]


def test_a_run_of_an_earlier_version_is_read(tmp_path):
    content = {"dsg": {"threshold": 0.2, "domains": {"forget": [0.5]}}}
    (tmp_path / "densities.json").write_text(json.dumps(content))
    assert read_drawn(tmp_path).densities["dsg"] == Densities(0.2, {"forget": [0.5]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"features": [{"feature_id": 1}]}', r"report\.json does not have the form"),
        ('{"features": [1]}', r"report\.json does not have the form"),
        ('{"settings": [{"tried": 1}]}', r"report\.json does not have the form"),
        ('{"densities": []}', r"report\.json does not have the form"),
        ("[]", r"report\.json does not have the form"),
    ],
)
def test_a_malformed_file_is_a_user_error(tmp_path, content, message):
    write_results(tmp_path, [])
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match=message):
        build_report(tmp_path)
