"""The unlearning score of a sweep, by hand."""

import pytest

from dsg.cli.grid.recovery import score_rows
from dsg.io.results import row


def measured(settings, split, guard, forget, retain, seed=0):
    place = {"experiment": settings, "split": split, "guard": guard, "seed": seed}
    return [
        row(**place, domain=domain, protocol="dsg", metric="accuracy", value=value, n=40)
        for domain, value in (("forget", forget), ("retain", retain))
    ]


def sweep(seed=0):
    rows = []
    for settings, validation, test in (
        # The lowest forget accuracy of all, but too little utility where it is chosen.
        ("strong", (0.20, 0.90), (0.20, 0.99)),
        ("chosen", (0.30, 0.99), (0.40, 0.95)),
        # Best on the half that is reported, which must not matter.
        ("weak", (0.50, 1.00), (0.10, 1.00)),
    ):
        for split, outcome in (("validation", validation), ("test", test)):
            rows += measured(settings, split, "off", 1.0, 1.0, seed)
            rows += measured(settings, split, "on", *outcome, seed)
    return rows


def test_one_half_chooses_and_the_other_reports():
    [found] = score_rows(sweep())
    assert found["experiment"] == "chosen"
    assert (found["metric"], found["split"], found["guard"]) == ("unlearning_score", "test", "on")
    assert found["value"] == pytest.approx(1 - 0.40)
    assert found["n"] == 40
    assert found["low"] < 0.6 < found["high"]


def test_each_seed_has_its_own():
    assert [found["seed"] for found in score_rows([*sweep(0), *sweep(1)])] == [0, 1]


def test_one_half_alone_gives_none():
    assert score_rows([found for found in sweep() if found["split"] == "test"]) == []


def test_no_setting_keeps_enough():
    rows = []
    for split in ("validation", "test"):
        rows += measured("one", split, "off", 1.0, 1.0) + measured("one", split, "on", 0.2, 0.9)
    assert score_rows(rows) == []
