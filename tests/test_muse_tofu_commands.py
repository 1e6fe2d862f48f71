"""The configurations of MUSE and TOFU, run by the command on tiny stand-ins."""

import json
from pathlib import Path

import pytest

from dsg.cli.main import main
from dsg.io.results import read_results
from tests.benchmark_folders import write_muse, write_tofu
from tests.hub_folders import write_gemma

CONFIGS = Path(__file__).parents[1] / "configs"
NUM = 4


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand_ins")
    write_gemma(folder / "gemma")
    write_muse(folder / "muse", NUM)
    write_tofu(folder / "tofu", NUM)
    return folder


def dsg(verb, config, model, dataset, *options):
    arguments = ["-c", str(CONFIGS / config), "--trainer.accelerator", "cpu"]
    arguments += ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    arguments += ["--model.model_name", str(model), "--data.model_name", str(model)]
    return main([verb, *arguments, "--data.dataset", str(dataset), *map(str, options)])


@pytest.mark.parametrize(
    ("benchmark", "evaluation", "reference", "metric"),
    [
        ("muse", "evaluate/muse_news.yaml", "retrained", "privleak"),
        ("muse", "evaluate/muse_books.yaml", "retrained", "privleak"),
        ("tofu", "evaluate/tofu.yaml", "retained", "forget_quality"),
    ],
)
def test_target_and_reference_are_made_and_compared(
    stand_ins, tmp_path, monkeypatch, capsys, benchmark, evaluation, reference, metric
):
    monkeypatch.chdir(tmp_path)
    dataset, model = stand_ins / benchmark, stand_ins / "gemma"
    short = ["--trainer.max_epochs", "1", "--trainer.precision", "32-true"]
    if "books" in evaluation:
        short += ["--data.corpus", "books"]
    for made in ("target", "retrained"):
        config = f"finetune/{benchmark}_{made}.yaml"
        run_dir = ["--run_dir", f"runs/{made}"]
        options = ["--data.max_length", "64", *run_dir, *short]
        assert dsg("fit", config, model, dataset, *options) == 0
        facts = json.loads(Path(f"runs/{made}/run.json").read_text())
        assert facts["data"]["training"]["n"] > 0

    # Without the reference the command tells how it is made.
    missing = [f"--data.{reference}", "runs/reference", "--run_dir", "runs/compared"]
    target = "runs/target/model"
    assert dsg("test", evaluation, target, dataset, *missing) == 2
    error = capsys.readouterr().err
    assert f"dsg fit -c configs/finetune/{benchmark}_retrained.yaml" in error
    assert f"--data.{reference} self" in error
    assert not Path("runs/compared").exists()

    itself = [f"--data.{reference}", "self", "--run_dir", "runs/reference"]
    assert dsg("test", evaluation, "runs/retrained/model", dataset, *itself) == 0
    assert dsg("test", evaluation, target, dataset, *missing) == 0
    [row] = [r for r in read_results("runs/compared") if r["metric"] == metric]
    assert row["split"] == "test"
    assert row["value"] is not None
