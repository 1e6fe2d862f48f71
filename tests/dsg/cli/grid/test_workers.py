"""Processes of a grid: they are reused, say why a cell failed, and may die without harm."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsg.cli.grid.cells import Cell
from dsg.cli.grid.workers import Workers

WORK = "tests.dsg.cli.grid.grid_work:work"


def cell(name: str, action: str) -> Cell:
    return Cell(name, "fit", {"action": action})


def run(run_dir: Path, cells: list[Cell], jobs: int = 1) -> dict[str, str | None]:
    with Workers(jobs, run_dir, WORK) as workers:
        workers.start(len(cells))
        return {done.name: reason for done, reason in workers.run(cells)}


def read(run_dir: Path, one: Cell, file: str) -> str:
    return (one.folder(run_dir) / file).read_text()


def test_one_process_does_many_cells_on_one_thread(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    cells = [cell(name, "write") for name in ("a", "b/c", "d")]
    assert run(tmp_path, cells) == {"a": None, "b/c": None, "d": None}
    assert len({read(tmp_path, one, "pid") for one in cells}) == 1
    assert {read(tmp_path, one, "begun") for one in cells} == {"1"}
    assert os.environ["OMP_NUM_THREADS"] == "4"
    assert all(one.is_finished(tmp_path) for one in cells)
    assert "write in" in cells[1].log(tmp_path).read_text()


def test_failures_are_one_sentence_and_the_others_finish(tmp_path):
    actions = ("refuse", "break", "exit", "die", "write")
    cells = [cell(action, action) for action in actions]
    reasons = run(tmp_path, cells, jobs=2)
    assert reasons["write"] is None
    assert reasons["refuse"] == "`lr` must be positive, got -1; raise it."
    assert str(reasons["break"]).startswith("RuntimeError: a bug (log: ")
    assert "with details" in cells[1].log(tmp_path).read_text()
    assert str(reasons["exit"]).startswith("SystemExit: 3")
    assert reasons["die"] == "Its process died twice; is memory short?"
    assert [one.is_finished(tmp_path) for one in cells] == [False] * 4 + [True]


def test_a_process_that_dies_once_costs_no_cell(tmp_path):
    cells = [cell("slow", "wait"), cell("dies", "die_once"), cell("later", "write")]
    assert run(tmp_path, cells, jobs=2) == {"slow": None, "dies": None, "later": None}
    # The cell beside it went down with it and was done again as well.
    assert (tmp_path / "died").exists()


def test_a_cell_begins_in_an_empty_folder(tmp_path):
    one = cell("a", "write")
    one.folder(tmp_path).mkdir(parents=True)
    (one.folder(tmp_path) / "half").write_text("of an earlier attempt")
    assert run(tmp_path, [one]) == {"a": None}
    assert not (one.folder(tmp_path) / "half").exists()


def test_leaving_the_block_ends_what_runs(tmp_path):
    with Workers(2, tmp_path, WORK) as workers:
        # The first outcome is that of the other cell; nobody waits for the second one.
        outcome = next(iter(workers.run([cell("hang", "hang"), cell("write", "write")])))
        assert (outcome.cell.name, outcome.reason) == ("write", None)
    assert not cell("hang", "hang").is_finished(tmp_path)
    assert cell("write", "write").is_finished(tmp_path)


ORPHANING = """
import sys
from pathlib import Path
from dsg.cli.grid.workers import Workers
from dsg.cli.grid.cells import Cell

if __name__ == "__main__":
    with Workers(1, Path(sys.argv[1]), "tests.dsg.cli.grid.grid_work:work") as workers:
        list(workers.run([Cell("hang", "fit", {"action": "hang"})]))
"""


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and "(zombie)" not in status.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_grid_leaves_nobody_at_work(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ORPHANING)
    root = Path(__file__).parents[4]
    command = [sys.executable, str(script), str(tmp_path / "run")]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(root)}) as grid:
        wait_for(lambda: list((tmp_path / "run").rglob("pid")))
        pid = next((tmp_path / "run").rglob("pid"))
        wait_for(lambda: pid.read_text())
        worker = int(pid.read_text())
        assert is_alive(worker)
        grid.kill()
    wait_for(lambda: not is_alive(worker))
