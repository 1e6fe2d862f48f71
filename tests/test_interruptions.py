"""Commands that are killed at random moments end, continued, like those that were left alone."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.choice_data import choice_rows, save_choice_model, write_rows
from tests.lightning_modules.toy import guard_settings, save_toy
from tests.text_writer import write_both
from tests.wandb_reader import find_run_file, read_history

ROOT = Path(__file__).parents[1]
HERE = "tests.lightning_modules"
# Kind of run -> moments at which it is ended; every other one by SIGTERM.
MOMENTS = {"attack": 12, "sequence": 10, "filter": 8, "grid": 8, "demo": 6, "cache": 6}
FILES = ("results.jsonl", "metrics.csv")
# What differs between two runs that log the same.
_TIMES = ("_runtime", "_timestamp")


class Server:
    """A process that runs commands for the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        toy = save_toy(folder)
        save_choice_model(folder / "choices")
        write_rows(folder / "choices.jsonl", choice_rows(6))
        write_both(folder)
        for name, config in configurations(toy).items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
            "WANDB_SILENT": "true",
            "DSG_CACHE": str(folder / "cache"),
        }
        # That of an earlier test in this process, which may end before the server does.
        environment.pop("WANDB_SERVICE", None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", str(folder / "errors.txt")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=ROOT,
            text=True,
        )
        self._read()

    def run(self, *argv: str, **end: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        request = {"argv": argv, "cwd": str(self.folder), **end}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._read())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def configurations(toy: Path) -> dict[str, Any]:
    guard = {
        key: value
        for key, value in vars(guard_settings(toy)).items()
        if key in ("sae", "hook_point", "num_features", "ratio_percentile", "clamp_value")
    }
    trainer = {
        "max_epochs": 3,
        "num_sanity_val_steps": -1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
    }
    steps = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"every_n_train_steps": 2},
    }
    model = {"model_name": str(toy / "model"), "guard": guard}
    attack = {
        "seed_everything": 0,
        "trainer": {**trainer, "callbacks": [steps]},
        "model": {
            "class_path": "lightning_modules.RelearningModule",
            "init_args": {
                **model,
                "mode": "test_time",
                "adapter": "lora",
                "lora_rank": 2,
                "lr": 1e-2,
                "attacker": {"class_path": f"{HERE}.interrupting.Noisy"},
            },
        },
        "data": {"class_path": f"{HERE}.toy.ToyData"},
    }
    sequence = {
        "trainer": {**trainer, "max_epochs": 2, "reload_dataloaders_every_n_epochs": 1},
        "model": {"class_path": "lightning_modules.SequentialModule", "init_args": model},
        "data": {"class_path": f"{HERE}.toy.ToyData", "init_args": {"kind": "requests"}},
    }
    asked = {
        "model_name": str(toy / "choices"),
        "protocol": "dsg",
        "batch_size": 17,
        "forget": [str(toy / "choices.jsonl")],
        "retain": [],
    }
    filtered = {
        "model": {
            "class_path": "lightning_modules.question_filter.QuestionFilterModule",
            "init_args": {"model_name": str(toy / "choices")},
        },
        "data": {
            "class_path": "datamodules.multiple_choice.data.MultipleChoiceData",
            "init_args": asked,
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    init_args = {**attack["model"]["init_args"], "seed": 0}
    cell = {
        **attack,
        "trainer": {**trainer, "max_epochs": 1},  # a grid's cells keep no checkpoints
        "model": {**attack["model"], "init_args": init_args},
    }
    grid = {
        "command": "fit",
        "config": "cell.yaml",
        "seeds": [0],
        "grid": {"model.init_args.lr": [1e-2, 2e-2]},
    }
    return {"attack": attack, "sequence": sequence, "filter": filtered, "cell": cell, "grid": grid}


COMMANDS = {
    "attack": ("fit", "-c", "attack.yaml"),
    "sequence": ("fit", "-c", "sequence.yaml"),
    "filter": ("validate", "-c", "filter.yaml"),
    "grid": ("grid", "grid.yaml", "--jobs", "1"),
    "demo": ("demo", "--forget", "forget.txt", "--retain", "retain.txt", "--epochs", "1"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("interruptions"))
    yield server
    server.close()


def command(kind: str, run_dir: str) -> tuple[str, ...]:
    if kind == "cache":
        return ("cache", run_dir)
    return (*COMMANDS[kind], "--run_dir", run_dir)


def contents(server: Server, kind: str, name: str) -> dict[str, Any]:
    """What must not depend on whether the run was interrupted."""
    if kind == "cache":
        cache = server.folder / "cache"
        assert not list(cache.glob(".*.draft"))
        folder = cache / name
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.iterdir()}
    folder = server.folder / name
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes()
        for file in FILES
        for path in folder.rglob(file)
    }
    assert "results.jsonl" in found
    assert not list(folder.rglob("metrics.before*"))
    if kind not in ("grid", "demo"):  # their cells log to files
        found["history"] = [
            {key: value for key, value in row.items() if key not in _TIMES and "summary" not in key}
            for row in read_history(find_run_file(folder))
        ]
    return found


def finish(server: Server, kind: str, name: str) -> None:
    """Continue a run, or start it again where there is nothing to continue."""
    options = () if kind == "cache" else ("--resume",)
    done = server.run(*command(kind, name), *options)
    if done["status"] == 2 and "--resume needs" in done["errors"]:
        done = server.run(*command(kind, name), "--overwrite")
    assert done["status"] == 0, done["errors"]


def interrupt(server: Server, kind: str, moments: int) -> None:
    """End a kind of run at random moments and compare each continued run with one left alone."""
    whole = server.run(*command(kind, f"{kind}_whole"))
    assert whole["status"] == 0, whole["errors"]
    expected = contents(server, kind, f"{kind}_whole")
    rng = random.Random(f"interruptions of {kind}")
    num_ended = 0
    for number in range(moments):
        sent = signal.SIGTERM if number % 2 else signal.SIGKILL
        delay, name = rng.random() * whole["seconds"], f"{kind}_{number}"
        ended = server.run(*command(kind, name), delay=delay, signal=sent)
        # SIGTERM finds nobody to answer before a command has begun and after it has ended.
        allowed = (0, -sent) if sent == signal.SIGKILL else (0, 143, -sent)
        assert ended["status"] in allowed, ended["errors"]
        if ended["status"] == 143 and kind != "cache":
            assert "dsg: terminated; " in ended["errors"]
        if ended["status"] != 0:
            num_ended += 1
            finish(server, kind, name)
        assert contents(server, kind, name) == expected, f"after {delay:.2f} s, signal {sent}"
    assert num_ended >= moments // 2, "most runs ended before the signal came"


@pytest.mark.parametrize("kind", ["attack", "cache"])
def test_a_few_moments(server, kind):
    interrupt(server, kind, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MOMENTS)
def test_fifty_moments(server, kind):
    interrupt(server, kind, MOMENTS[kind])
