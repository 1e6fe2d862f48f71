"""`dsg fit|test`: refused configurations, the run directory's contents, resuming, two ranks."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsg.cli import lightning_cli
from dsg.cli.config_errors import one_sentence
from dsg.cli.main import main
from dsg.errors import UserError
from tests.wandb_reader import find_run_file, read_history

ROOT = Path(__file__).parents[3]
HERE = "tests.dsg.cli.tiny_runs"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lrr": 0.1}, "has no entry 'lrr'; did you mean lr?"),
        ({"lr": "fast"}, "`model.init_args.lr` must be a number, got 'fast'"),
        ({"model": "TinyModul"}, "has no 'TinyModul'; did you mean TinyModule"),
        (
            {"trainer": {"max_epocs": 1}},
            "there is no option 'trainer.max_epocs'; did you mean trainer.max_epochs",
        ),
        (
            {"trainer": {"max_epochs": "x"}},
            "`trainer.max_epochs` must be a whole number, got 'x'; see dsg fit --help.",
        ),
    ],
)
def test_wrong_configuration_is_one_line_and_leaves_nothing(change, message, write_config, capsys):
    assert main(["fit", "-c", write_config(**change)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("dsg: error: ")
    assert error.count("\n") == 1
    assert os.listdir() == ["tiny.yaml"]


def test_own_classes_are_found_in_the_working_directory(write_config, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("own_runs.py").write_text(
        "from tests.dsg.cli.tiny_runs import TinyModule\n\n\nclass Own(TinyModule):\n    pass\n"
    )
    config = yaml.safe_load(Path(write_config()).read_text())
    config["model"]["class_path"] = "own_runs.Own"
    Path("own.yaml").write_text(yaml.safe_dump(config))
    assert main(["test", "-c", "own.yaml"]) == 0
    assert sys.modules.pop("own_runs").__file__ == str(Path("own_runs.py").absolute())


def test_missing_configuration_file_is_one_line(capsys):
    assert main(["fit", "-c", "missing.yaml"]) == 2
    assert "'missing.yaml' cannot be read (no such file or directory)" in capsys.readouterr().err


def test_sentence_of_a_nested_refusal():
    message = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'a.b.Module'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'tests.dsg.cli.tiny_runs.TinyModule':
        Parser key "ids":
          Does not validate against any of the Union subtypes
          Subtypes: [list[int], <class 'NoneType'>]
          Errors:
            - Expected a <class 'int'>
            - Expected a <class 'NoneType'>
          Given value type: <class 'str'>
          Given value: a
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {'class_path': 'm.M'}"""
    assert one_sentence(message, "mend it") == (
        "`model.init_args.ids` must be a whole number, got 'a'; mend it."
    )


def test_run_directory_is_named_after_the_configurations(write_config):
    config = write_config(lr=0.25)
    write_config(name="part.yaml", lr=0.5)
    assert main(["fit", "-c", config, "-c", "part.yaml"]) == 0
    assert os.listdir("runs") == ["tiny_part"]
    saved = yaml.safe_load(Path("runs/tiny_part/config.yaml").read_text())
    assert saved["model"]["init_args"]["lr"] == 0.5
    facts = json.loads(Path("runs/tiny_part/run.json").read_text())
    assert facts["config"] == saved
    assert facts["world_size"] == 1
    assert facts["command"] == ["dsg", "fit", "-c", "tiny.yaml", "-c", "part.yaml"]


def test_saved_configuration_runs_again_and_does_not_overwrite(write_config, capsys):
    config = write_config()
    assert main(["test", "-c", config, "--run_dir", "out"]) == 0
    assert main(["test", "-c", config, "--run_dir", "out", "--overwrite"]) == 0
    assert main(["test", "-c", "out/config.yaml"]) == 2
    assert "run_dir 'out' already holds files" in capsys.readouterr().err
    assert main(["test", "-c", "out/config.yaml", "--run_dir", "again"]) == 0


def test_default_loggers_write_into_the_run_directory(write_config, capsys):
    config = write_config()
    text = yaml.safe_load(Path(config).read_text())
    del text["trainer"]["logger"]
    Path(config).write_text(yaml.safe_dump(text))
    assert main(["fit", "-c", config, "--run_dir", "out", "--trainer.max_epochs", "3"]) == 0
    with Path("out/metrics.csv").open() as file:
        logged = {int(row["epoch"]): float(row["train/loss"]) for row in csv.DictReader(file)}
    tracked = {
        row["epoch"]: row["train/loss"]
        for row in read_history(find_run_file(Path("out")))
        if "train/loss" in row
    }
    assert sorted(tracked) == [0, 1, 2]
    assert tracked == pytest.approx(logged, rel=1e-6)
    assert sorted(os.listdir()) == ["out", "tiny.yaml"]
    assert capsys.readouterr().out.endswith("out/metrics.csv  what was logged on the way\n")


def test_input_found_wrong_during_the_run_leaves_nothing(write_config, capsys):
    assert main(["fit", "-c", write_config("RefusingModule")]) == 2
    assert capsys.readouterr().err == (
        "dsg: error: The SAE has d_in 8, the model 16; give a matching SAE.\n"
    )
    assert os.listdir() == ["tiny.yaml"]


def test_trainer_that_cannot_be_had_is_one_line(write_config, capsys):
    config = write_config(trainer={"limit_train_batches": -1})
    assert main(["fit", "-c", config]) == 2
    error = capsys.readouterr().err
    assert "limit_train_batches" in error
    assert error.count("\n") == 1
    assert os.listdir() == ["tiny.yaml"]


def test_embedded_benchmark_is_resolved_for_the_run_but_not_saved(write_config, monkeypatch):
    import types

    import torch

    drawn = []

    def ensure_tiny_world(seed):
        torch.rand(seed)  # training draws random numbers when the cache is cold
        drawn.append(seed)
        return Path("/cache") / str(seed)

    fake = types.SimpleNamespace(ensure_tiny_world=ensure_tiny_world)
    monkeypatch.setitem(sys.modules, "dsg.cli.tiny_world", fake)
    seen = []
    monkeypatch.setattr(
        "tests.dsg.cli.tiny_runs.TinyModule.setup",
        lambda self, **_: seen.append((self.model_folder, torch.rand(1).item())),
    )
    for seed in (3, 5):
        config = write_config(model_folder=f"tiny_world:{seed}/model")
        assert main(["test", "-c", config, "--run_dir", f"out{seed}"]) == 0
    assert drawn == [3, 5]
    assert [folder for folder, _ in seen] == ["/cache/3/model", "/cache/5/model"]
    assert seen[0][1] == seen[1][1], "the run's random numbers depend on the cache"
    saved = yaml.safe_load(Path("out3/config.yaml").read_text())
    assert saved["model"]["init_args"]["model_folder"] == "tiny_world:3/model"


def test_misspelt_benchmark_is_refused():
    assert lightning_cli.resolve_benchmark("some/folder") == "some/folder"
    with pytest.raises(UserError, match=r"tiny_world:SEED/model or .* got 'tiny_world:0/modl'"):
        lightning_cli.resolve_benchmark("tiny_world:0/modl")


@pytest.mark.parametrize("model", ["TinyModule", "RefusingModule"])
def test_two_ranks_share_one_run_directory(model, write_config):
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run(
        [sys.executable, "-m", "dsg", "test", "-c", write_config(model), *ranks],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if model == "TinyModule":
        assert done.returncode == 0, done.stderr
        assert json.loads(Path("runs/tiny/run.json").read_text())["world_size"] == 2
    else:
        assert done.returncode == 2
        assert "dsg: error: The SAE has d_in 8" in done.stderr
        assert "Traceback" not in done.stderr
        assert not Path("runs").exists()
