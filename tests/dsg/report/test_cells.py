"""The flat table holds what the rows say, once per seed, data set and method."""

import csv

from dsg.io.results import row, write_results
from dsg.report.cells import write_cells


def measured(**fields):
    common = {"seed": 0, "dataset": "world", "split": "test", "protocol": "cloze"}
    return row(**{**common, **fields})


def test_one_line_per_seed_dataset_and_method(tmp_path):
    rows = [
        measured(
            method="dsg", guard="on", domain="forget", metric="accuracy",
            value=0.25, n=72, low=0.17, high=0.36,
        ),
        measured(
            method="dsg", guard="off", domain="forget", metric="accuracy",
            value=1.0, n=72, low=0.95, high=1.0,
        ),
        measured(method="dsg", guard="on", domain="forget", metric="density_auroc", value=0.99),
        measured(
            method="base", guard="none", domain="retain", metric="accuracy",
            value=0.98, n=288, low=0.96, high=0.99,
        ),
        measured(
            method="dsg", guard="on", domain="forget", metric="accuracy", seed=1,
            value=0.5, n=72, low=0.4, high=0.6,
        ),
        measured(
            method="dsg", guard="on", domain="forget", metric="accuracy", attack="relearn_full",
            epoch=1, value=0.9, n=72, low=0.8, high=1.0,
        ),
    ]  # fmt: skip
    write_results(tmp_path, rows)
    path = write_cells(tmp_path)
    assert path is not None
    with path.open(newline="") as file:
        lines = {(line["seed"], line["method"]): line for line in csv.DictReader(file)}
    assert set(lines) == {("0", "dsg"), ("0", "base"), ("1", "dsg")}
    cell = lines["0", "dsg"]
    assert (cell["forget_accuracy"], cell["forget_accuracy_n"]) == ("0.25", "72")
    assert (cell["forget_accuracy_low"], cell["forget_accuracy_high"]) == ("0.17", "0.36")
    assert cell["below_chance"] == lines["1", "dsg"]["below_chance"] == "0"
    assert (cell["density_auroc"], cell["retain_accuracy"]) == ("0.99", "")


def test_a_run_without_side_by_side_rows_has_no_table(tmp_path):
    write_results(tmp_path, [measured(method="dsg", attack="relearn_full", epoch=0, value=1.0)])
    assert write_cells(tmp_path) is None
