"""Cells over seeds and data sets, by hand."""

import pytest

from dsg.io.results import row
from dsg.report.measurements import Measurements, interval_note
from tests.report_data import accuracy


def test_cells_over_seeds_by_hand():
    def over(*values):
        rows = [accuracy("dsg", "near", value, seed=seed) for seed, value in enumerate(values)]
        return Measurements(rows).cell(metric="accuracy")

    assert (over(0.5).low, over(0.5).high, over(0.5).num_seeds) == (0.46, 0.54, 1)
    two = over(0.5, 0.6)
    assert (two.value, two.low, two.high, two.num_seeds) == (0.55, 0.5, 0.6, 2)
    three = over(0.5, 0.6, 0.7)  # t(2) = 4.3027, standard error 0.1 / sqrt 3
    assert three.low == pytest.approx(0.6 - 4.3027 * 0.057735, abs=1e-4)
    assert over(0.9, 1.0, 1.0).high == 1.0
    assert "Student t" in interval_note(3)


def test_cells_prefer_test_facts_and_the_overall_protocol():
    rows = [
        accuracy("dsg", "near", 0.1, split="validation"),
        accuracy("dsg", "near", 0.2, split="test", protocol="cloze_question"),
        accuracy("dsg", "near", 0.3, split="test"),
    ]
    assert Measurements(rows).cell(domain="near").value == 0.3


def test_of_several_epochs_the_last_counts():
    rows = [accuracy("rmu", "near", 0.1 * epoch, epoch=epoch) for epoch in (0, 2, 1)]
    assert Measurements(rows).cell(domain="near").value == 0.2


def test_below_chance_is_flagged_from_all_seeds_together():
    rows = [accuracy("dsg", "forget", 0.18, n=60, seed=seed) for seed in range(4)]
    assert not Measurements(rows[:1]).cell().below_chance
    assert Measurements(rows).cell().below_chance


def test_runs_of_a_grid_get_a_table_each_and_parts_of_one_run_share_one():
    grid = [accuracy("dsg", "near", 0.1 * i, experiment=f"grid{i}") for i in range(3)]
    assert [title for title, _ in Measurements(grid).groups()] == ["grid0", "grid1", "grid2"]
    parts = [accuracy("dsg", "near", 0.1, experiment="a"), accuracy("rmu", "near", 0.1)]
    assert len(Measurements(parts).groups()) == 1


def test_several_datasets_get_a_mean_row_of_their_own():
    shared = {"model": "m", "domain": "forget", "metric": "accuracy", "protocol": "cloze"}
    values = {("a", 0): 0.2, ("b", 0): 0.4, ("a", 1): 0.1, ("b", 1): 0.1}
    rows = [
        row(**shared, method=method, dataset=dataset, seed=seed, split="test", value=value, n=10)
        for (dataset, seed), value in values.items()
        for method in ("base", "dsg")
    ]
    comparisons = Measurements(rows).comparisons()
    assert [title for title, _ in comparisons] == ["m, a", "m, b", "mean of 2 data sets"]
    cell = comparisons[-1][1].cell(method="dsg", metric="accuracy", domain="forget")
    assert cell is not None
    assert (cell.num_seeds, cell.n) == (2, 20)
    assert (cell.num_below_chance, cell.num_runs) == (0, 4)
    assert cell.value == pytest.approx(0.2)  # seed 0: 0.3, seed 1: 0.1
    assert (cell.low, cell.high) == pytest.approx((0.1, 0.3))
