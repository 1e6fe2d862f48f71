"""The skeletons for own models, questions and texts, end to end on tiny files."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from dsg.cli.main import main
from dsg.io.results import read_results
from tests.choice_data import choice_rows, save_choice_model, write_rows
from tests.helpers import standard_sae

CONFIGS = Path(__file__).parents[1] / "configs" / "own"
QUICK = ("--trainer.logger", "false", "--trainer.enable_progress_bar", "false")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A working directory with everything that the skeletons name."""
    root = tmp_path_factory.mktemp("own")
    own = root / "own"
    own.mkdir()
    save_choice_model(own / "model")
    standard_sae(d_sae=64).save_model(str(own / "sae"))
    for seed, (pool, low, high) in enumerate((("forget", 0, 12), ("retain", 10, 26))):
        write_rows(own / f"{pool}_questions.jsonl", choice_rows(12, seed, pool))
        words = torch.randint(
            low, high, (60, 12), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        texts = [" ".join(f"w{word}" for word in row) for row in words]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (own / f"{pool}.jsonl").write_text("".join(lines))
        rows = [{"id": f"{pool} {i}", "domain": pool, "text": text} for i, text in enumerate(texts)]
        with (own / "texts.jsonl").open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows[:5]))
    return root


def run(command: str, name: str, *options: str) -> Path:
    arguments = ["-c", str(CONFIGS / f"{name}.yaml"), *options, *QUICK]
    assert main([command, *arguments, "--trainer.accelerator", "cpu"]) == 0
    return Path(f"runs/own_{name}")


def test_skeletons_run_one_after_the_other(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    few = "--model.init_args.guard.num_features=3"
    selected = run("validate", "select", few, "--model.init_args.guard.ratio_percentile=50")
    assert (selected / "guard" / "guard.json").is_file()
    assert "guard the guard, for `artifact`" in " ".join(capsys.readouterr().out.split())

    rows = read_results(run("test", "questions"))
    kinds = {(row["guard"], row["domain"]) for row in rows if row["metric"] == "accuracy"}
    assert {(state, pool) for state in ("off", "on") for pool in ("forget", "retain")} <= kinds
    assert "trigger_rate" in {row["metric"] for row in rows}

    predicted = run("predict", "predict", "--model.init_args.max_new_tokens=3")
    lines = [json.loads(line) for line in (predicted / "predictions.jsonl").open()]
    assert [line["id"] for line in lines] == [
        f"{pool} {place}" for pool in ("forget", "retain") for place in range(5)
    ]
    threshold = json.loads((selected / "guard" / "guard.json").read_text())["settings"]["gate"][
        "threshold"
    ]
    assert {line["threshold"] for line in lines} == {threshold}

    short = ("--trainer.max_epochs=1", "--data.init_args.train_length=32")
    unlearned = run("fit", "unlearn", *short)
    assert {row["epoch"] for row in read_results(unlearned)} == {0, 1}
    assert (unlearned / "model" / "config.json").is_file()


def test_skeletons_explain_themselves():
    for path in CONFIGS.glob("*.yaml"):
        text = path.read_text()
        assert sum(line.strip().startswith("#") for line in text.splitlines()) >= 5
        assert yaml.safe_load(text)["model"]["init_args"]["model_name"] == "own/model"
