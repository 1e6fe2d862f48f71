"""`dsg grid` with real processes: parallel, resumable, and honest about what failed."""

import argparse
import csv
import json
from pathlib import Path

import pytest
import yaml

from dsg.cli import lightning_cli
from dsg.cli.grid import command as grid
from dsg.cli.grid import workers as grid_workers
from dsg.cli.grid.file import read_grid
from dsg.errors import UserError
from dsg.io.results import read_results

RUN = "tests.dsg.cli.grid.grid_runs.MeasuringModule"


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A function that writes a sweep over learning rates and returns the file's name."""
    monkeypatch.chdir(tmp_path)
    config = {
        "trainer": {"max_epochs": 2, "logger": False, "enable_model_summary": False},
        "model": {"class_path": RUN, "init_args": {"lr": 0.1, "seed": 0}},
        "data": {"class_path": "tests.dsg.cli.tiny_runs.TinyData"},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))

    def write(**changes):
        content = {
            "command": "fit",
            "config": "run.yaml",
            "seeds": [0, 2],
            "grid": {"model.init_args.lr": [0.25, 0.5]},
        }
        Path("sweep.yaml").write_text(yaml.safe_dump({**content, **changes}))
        return "sweep.yaml"

    return write


@pytest.fixture
def quick(monkeypatch):
    """Cells without a Lightning run, whose imports would take seconds in each process."""
    monkeypatch.setattr(grid_workers, "WORK", "tests.dsg.cli.grid.grid_work:measure")


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    grid.add_arguments(parser)
    return grid.run(parser.parse_args(arguments))


def table(run_dir: str) -> dict[tuple[str, str], dict[str, str]]:
    with Path(run_dir, "table.csv").open(newline="") as file:
        return {(line["experiment"], line["metric"]): line for line in csv.DictReader(file)}


def marks(run_dir: str) -> dict[str, int]:
    found = Path(run_dir, "cells").rglob("cell.json")
    return {str(mark.parent.relative_to(run_dir)): mark.stat().st_mtime_ns for mark in found}


def test_a_cell_is_the_run_that_its_configuration_says(sweep):
    name = sweep(seeds=[0, 2], grid={"model.init_args.lr": [0.5]})
    assert run(name, "--jobs", "1", "--run_dir", "r") == 0
    config = yaml.safe_load(Path("r/configs/lr=0.5/seed_2.yaml").read_text())
    assert config["model"]["init_args"] == {"lr": 0.5, "seed": 2}
    # The second cell of a process, and the same run alone in this one, with other things before it.
    lightning_cli.run(["fit", "-c", "r/configs/lr=0.5/seed_2.yaml", "--run_dir", "alone"])
    alone = {found["metric"]: found["value"] for found in read_results("alone")}
    cell = {found["metric"]: found["value"] for found in read_results("r/cells/lr=0.5/seed_2")}
    assert cell == alone
    assert cell["accuracy"] == 2.5
    weights = [r["value"] for r in read_results("r") if r["metric"] == "weight"]
    assert len(set(weights)) == 2


@pytest.mark.usefixtures("quick")
def test_a_sweep_runs_every_combination_with_every_seed(sweep, capsys):
    assert run(sweep(), "--jobs", "2", "--run_dir", "two") == 0
    assert sorted(marks("two")) == [
        f"cells/lr={lr}/seed_{seed}" for lr in (0.25, 0.5) for seed in (0, 2)
    ]
    line = table("two")["lr=0.25", "accuracy"]
    assert (line["mean"], line["n_seeds"]) == ("1.25", "2")  # of 0.25 + 0 and 0.25 + 2
    shown = capsys.readouterr().out
    assert "4 cells" in shown
    assert "125.0" in shown
    facts = json.loads(Path("two/run.json").read_text())
    assert (facts["jobs"], facts["failures"], len(facts["seconds"])) == (2, {}, 4)
    assert run(sweep(), "--jobs", "1", "--run_dir", "one") == 0
    for file in ("results.jsonl", "table.csv"):
        assert Path("one", file).read_bytes() == Path("two", file).read_bytes()
    assert {(r["experiment"], r["seed"]) for r in read_results("one")} == {
        (f"lr={lr}", seed) for lr in (0.25, 0.5) for seed in (0, 2)
    }


def test_a_sweep_in_halves_gives_the_unlearning_score(sweep, capsys, monkeypatch):
    monkeypatch.setattr(grid_workers, "WORK", "tests.dsg.cli.grid.grid_work:measure_halves")
    assert run(sweep(command="halves", seeds=[0]), "--jobs", "1", "--run_dir", "r") == 0
    assert sorted(marks("r")) == [
        f"cells/lr={lr}/seed_0/{command}" for lr in (0.25, 0.5) for command in ("test", "validate")
    ]
    # 0.5 forgets more but keeps too little.
    line = table("r")["lr=0.25", "unlearning_score"]
    assert (line["mean"], line["split"], line["n_seeds"]) == ("0.25", "test", "1")
    assert "chosen on validation questions: lr=0.25" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("quick")
def test_resuming_does_only_what_is_missing_or_new(sweep, capsys):
    assert run(sweep(), "--jobs", "1", "--run_dir", "r") == 0
    before, results = marks("r"), Path("r/results.jsonl").read_bytes()
    Path("r/cells/lr=0.5/seed_0/cell.json").unlink()
    capsys.readouterr()
    assert run(sweep(), "--jobs", "1", "--run_dir", "r", "--resume") == 0
    after = marks("r")
    assert [name for name in after if after[name] != before[name]] == ["cells/lr=0.5/seed_0"]
    assert "4 cells, 3 finished earlier" in capsys.readouterr().out
    assert Path("r/results.jsonl").read_bytes() == results

    # A grid that has grown keeps its cells; one that fixes something else does not.
    wider = sweep(grid={"model.init_args.lr": [0.25, 0.5, 1.0]})
    assert run(wider, "--jobs", "1", "--run_dir", "r", "--resume") == 0
    assert {n: m for n, m in marks("r").items() if n in after} == after
    assert len(marks("r")) == 6
    other = sweep(fixed={"trainer.max_epochs": 3})
    assert run(other, "--jobs", "1", "--run_dir", "r", "--resume") == 0
    assert not {(n, m) for n, m in marks("r").items() if "lr=1" not in n} & set(after.items())

    with pytest.raises(UserError, match="already holds files"):
        run(sweep(), "--jobs", "1", "--run_dir", "r")


@pytest.mark.usefixtures("quick")
def test_a_failed_cell_is_told_at_the_end_and_the_others_finish(sweep, capsys):
    rates = {"model.init_args.lr": [-1.0, 0.5]}
    assert run(sweep(seeds=[0], grid=rates), "--jobs", "1", "--run_dir", "r") == 1
    assert sorted(marks("r")) == ["cells/lr=0.5/seed_0"]
    shown = capsys.readouterr().out
    assert "failed lr=-1/seed_0: `lr` must be positive, got -1.0; raise it." in shown
    assert "1 failed" in shown
    failures = json.loads(Path("r/run.json").read_text())["failures"]
    assert list(failures) == ["lr=-1/seed_0"]
    assert list(table("r")) == [("lr=0.5", "accuracy")]
    # Whoever resumes tries it again.
    rates = {"model.init_args.lr": [1.0, 0.5]}
    assert run(sweep(seeds=[0], grid=rates), "--jobs", "1", "--run_dir", "r", "--resume") == 0


@pytest.mark.usefixtures("quick")
def test_an_interrupt_says_how_to_continue(sweep, monkeypatch):
    name = sweep()
    monkeypatch.setattr("sys.argv", ["dsg", "grid", name, "--overwrite", "--run_dir", "r"])

    def interrupted(self, cells):
        yield from real(self, cells[:1])
        raise KeyboardInterrupt

    real = grid_workers.Workers.run
    monkeypatch.setattr(grid_workers.Workers, "run", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"continue with: dsg grid sweep.yaml .*--resume"):
        run(name, "--jobs", "1", "--run_dir", "r")
    assert len(marks("r")) == 1
    monkeypatch.setattr(grid_workers.Workers, "run", real)
    assert run(name, "--jobs", "1", "--run_dir", "r", "--resume") == 0
    assert len(marks("r")) == 4


def test_a_wrong_key_is_told_before_anything_runs(sweep):
    name = sweep(grid={"model.init_args.rate": [1.0]})
    with pytest.raises(UserError, match="rate") as caught:
        run(name, "--run_dir", "r")
    assert "\n" not in str(caught.value)
    assert not Path("r").exists()


def test_jobs_must_be_positive(sweep):
    with pytest.raises(UserError, match="--jobs must be at least 1, got 0"):
        run(sweep(), "--jobs", "0")


@pytest.mark.usefixtures("quick")
def test_fast_is_one_small_cell(sweep):
    assert run(sweep(), "--fast", "--jobs", "1") == 0
    assert list(marks("runs/sweep_fast")) == ["cells/lr=0.25/seed_0"]
    assert len(read_results("runs/sweep_fast")) == 1


@pytest.mark.slow
def test_the_fast_benchmark_grid_compares_and_attacks(tmp_path):
    """The real thing on the embedded benchmark, in minutes."""
    path = Path(__file__).parents[4] / "configs" / "grids" / "tiny_world.yaml"
    assert run(str(path), "--fast", "--run_dir", str(tmp_path / "r")) == 0
    full = read_grid(path)
    rows = read_results(tmp_path / "r")
    assert {r["method"] for r in rows} == set(full.methods)
    assert {r["attack"] for r in rows} == {None, "relearn_full"}
    assert {r["seed"] for r in rows} == {0}
    metrics = {line["metric"] for line in csv.DictReader((tmp_path / "r/table.csv").open())}
    assert {"accuracy", "perplexity", "alignment", "recovery_area", "seconds_to_unlearn"} <= metrics
    page = (tmp_path / "r/report.html").read_text()
    assert page.count("<svg") >= 2
    assert (tmp_path / "r/overview.png").stat().st_size > 10_000
    before = (tmp_path / "r/results.jsonl").read_bytes()
    assert run(str(path), "--fast", "--run_dir", str(tmp_path / "r"), "--resume") == 0
    assert (tmp_path / "r/results.jsonl").read_bytes() == before
