"""Stages run once, in folders of their own, and are read back when a run is resumed."""

import io
import json

import pytest
from rich.console import Console

from dsg.cli.demo.stages import Stages
from dsg.cli.demo.time_left import TimeLeft
from dsg.io.results import row, write_results


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


def work_of(calls, value):
    def work(folder):
        calls.append(folder.name)
        write_results(folder, [row(method="dsg", metric="accuracy", value=value)])
        return {"chosen": value}

    return work


def test_a_stage_runs_once_and_its_rows_are_collected(tmp_path, console):
    calls = []
    stages = Stages(tmp_path, console)
    assert stages.run("a/one", "first", work_of(calls, 0.5)) == {"chosen": 0.5}
    resumed = Stages(tmp_path, console)
    assert resumed.run("a/one", "first", work_of(calls, 0.9)) == {"chosen": 0.5}
    assert calls == ["one"]
    assert resumed.rows == stages.rows
    assert [found["value"] for found in resumed.rows] == [0.5]
    assert "finished earlier" in console.file.getvalue()


def test_an_interrupted_stage_starts_afresh(tmp_path, console):
    def fails(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    stages = Stages(tmp_path, console)
    with pytest.raises(KeyboardInterrupt):
        stages.run("one", "first", fails)
    calls = []
    stages.run("one", "first", work_of(calls, 0.1))
    assert calls == ["one"]
    assert not (stages.folder("one") / "half").exists()


def test_a_stage_without_result_gives_an_empty_one(tmp_path, console):
    stages = Stages(tmp_path, console)
    assert stages.run("quiet", "nothing", lambda _: None) == {}
    assert json.loads((stages.folder("quiet") / "stage.json").read_text()) == {}


def test_a_stage_is_named_when_it_begins(tmp_path, console):
    usual = {"one": 60.0, "two": 120.0}
    seen = []

    def work(_):
        seen.append(console.file.getvalue())

    for _ in range(2):
        stages = Stages(tmp_path, console, TimeLeft(usual, trusted=1e9))
        stages.run("one", "first", work)
        assert stages.watch("two", "second", lambda: work(None) or 7) == 7
    assert seen[0] == "first ... about 3 min left\n"
    assert seen[1].endswith("second ... about 2 min left\n")
    # What is finished is not begun again.
    assert seen[2].count("first ... ") == 1
    assert "first  finished earlier" in seen[2]
