"""An attack in Weights & Biases, and an attack for which it does not work."""

import csv
import importlib.util
import json

import pytest
import wandb
import yaml

from dsg.cli.main import main
from dsg.io.results import read_results
from tests.lightning_modules.toy import guard_settings, save_toy
from tests.wandb_reader import find_run_file, read_axes, read_history, read_run

EPOCHS = 2


@pytest.fixture
def attack(tmp_path, monkeypatch):
    """Run a relearning attack on the toy in a directory of its own; gives the run directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    toy = save_toy(tmp_path)

    def run():
        config = {
            "trainer": {
                "max_epochs": EPOCHS,
                "num_sanity_val_steps": -1,
                "accelerator": "cpu",
                "enable_progress_bar": False,
                "log_every_n_steps": 1,
            },
            "model": {
                "class_path": "lightning_modules.RelearningModule",
                "init_args": {
                    "model_name": str(toy / "model"),
                    "mode": "test_time",
                    "lr": 1e-2,
                    "experiment": "robustness",
                    "seed": 3,
                    "guard": {
                        "sae": str(toy / "sae"),
                        "hook_point": guard_settings(toy).hook_point,
                        "num_features": 1,
                        "ratio_percentile": 50.0,
                    },
                },
            },
            "data": {"class_path": "tests.lightning_modules.toy.ToyData"},
        }
        (tmp_path / "attack.yaml").write_text(yaml.safe_dump(config))
        assert main(["fit", "-c", "attack.yaml", "--run_dir", "run"]) == 0
        return tmp_path / "run"

    yield run
    if wandb.run is not None:
        wandb.finish()


def epochs_in_csv(run_dir) -> set[int]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return {
            int(float(row["epoch"]))
            for row in csv.DictReader(file)
            if row["val/forget/guard_on/accuracy"]
        }


def check_complete(run_dir) -> None:
    assert {row["epoch"] for row in read_results(run_dir)} == set(range(EPOCHS + 1))
    assert epochs_in_csv(run_dir) == set(range(EPOCHS + 1))
    assert json.loads((run_dir / "run.json").read_text())["data"] == {"texts": 10}


def test_an_attack_is_one_run_with_stable_keys_per_epoch(attack):
    run_dir = attack()
    check_complete(run_dir)
    path = find_run_file(run_dir)
    run = read_run(path)
    assert (run["name"], run["group"]) == ("run", "robustness")
    assert (run["job_type"], run["tags"]) == ("relearning", ["fit", "Toy"])
    assert run["project"] == "dynamic-sae-guardrails"
    assert run["config"]["config"]["model"]["init_args"]["seed"] == 3
    assert run["config"]["data"] == {"texts": 10}

    history = read_history(path)
    curves = [
        {key: value for key, value in row.items() if key.startswith("val/")} for row in history
    ]
    places = [
        (row["epoch"], row["trainer/global_step"])
        for row, curve in zip(history, curves, strict=True)
        if curve
    ]
    curves = [curve for curve in curves if curve]
    assert places == [(0, 0), (1, 3), (2, 6)]
    axes = read_axes(path)
    assert {axes[key] for key in curves[0]} == {"epoch"}
    assert len({frozenset(curve) for curve in curves}) == 1
    for row in read_results(run_dir):
        if row["protocol"] == "cloze" and row["metric"] == "accuracy":
            key = f"val/{row['domain']}/guard_{row['guard']}/accuracy"
            assert curves[row["epoch"]][key] == pytest.approx(row["value"], rel=1e-5)
    assert {"val/forget/guard_off/drift_cosine", "val/forget/guard_on/trigger_rate"} <= set(
        curves[0]
    )

    [table_file] = run_dir.rglob("media/table/*.table.json")
    table = json.loads(table_file.read_text())
    column = {name: index for index, name in enumerate(table["columns"])}
    assert {cells[column["epoch"]] for cells in table["data"]} == {0, EPOCHS}
    assert {"accuracy", "perplexity"} <= {cells[column["metric"]] for cells in table["data"]}


def fail(*_args, **_kwargs):
    raise RuntimeError("no space left")


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_a_run_survives_a_tracker_that_fails(attack, monkeypatch, caplog, place):
    owner = wandb.sdk.wandb_run.Run if place == "log" else wandb
    with monkeypatch.context() as patched:
        patched.setattr(owner, place, fail)
        run_dir = attack()
    check_complete(run_dir)
    said = [text for text in caplog.messages if "W&B does not work (no space left)" in text]
    assert len(said) == (place != "finish")


def test_a_run_needs_no_tracker(attack, monkeypatch, caplog):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name != "wandb" and find_spec(name, *rest)
    )
    run_dir = attack()
    check_complete(run_dir)
    assert "W&B does not work (it is not installed)" in caplog.text
    assert not list(run_dir.rglob("*.wandb"))
