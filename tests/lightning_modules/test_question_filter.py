"""The question-filter run: against brute force, on several ranks, and killed in the middle."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
import yaml

from datamodules.multiple_choice.data import MultipleChoiceData
from dsg.cli.main import main
from dsg.errors import UserError
from dsg.evaluation.benchmarks.multiple_choice.permutations import VARIANTS
from dsg.io.results import read_results
from lightning_modules import question_filter
from lightning_modules.question_filter import QuestionFilterModule
from tests.choice_data import (
    choice_model,
    choice_rows,
    choice_tokenizer,
    save_choice_model,
    write_rows,
)
from tests.lightning_modules.toy import make_trainer

ROOT = Path(__file__).parents[2]
ROWS = choice_rows(3)
LETTERS = "ABCD"


class Kill(lightning.Callback):
    """Ends the process without any warning before batch `number`."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_validation_batch_start(self, *arguments):
        _, _, _, batch_idx, *_ = arguments
        if batch_idx == self.number:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filter")
    save_choice_model(folder / "model")
    write_rows(folder / "toy.jsonl", ROWS)
    return folder


def data(toy, protocol="dsg", **changes):
    settings = {"batch_size": 17, "protocol": protocol, **changes}
    return MultipleChoiceData(str(toy / "model"), [str(toy / "toy.jsonl")], [], **settings)


def run(toy, run_dir, protocol="dsg", batch_size=17, **trainer):
    module = QuestionFilterModule(str(toy / "model"))
    made = data(toy, protocol, batch_size=batch_size)
    make_trainer(run_dir, **trainer).validate(module, made, verbose=False)
    return module


def brute_force(protocol):
    """Outcomes in float64, each letter behind each prompt in a forward pass of its own."""
    model, tokenizer = choice_model().double(), choice_tokenizer()
    found = {}
    for place, row in enumerate(ROWS):
        orders = torch.cartesian_prod(*[torch.arange(4)] * 4).tolist()
        orders = [order for order in orders if len(set(order)) == 4]
        for number in range(VARIANTS):
            order = orders[number % 24]
            lines = [f"{LETTERS[i]}. {row.choices[order[i]]}" for i in range(4)]
            if number < 24:
                lines.insert(0, row.question)
                lines.insert(
                    0, "The following are multiple choice questions (with answers) about toy."
                )
                if protocol == "lm_eval":
                    lines.insert(1, "")
            text = "\n".join(lines)
            if protocol == "lm_eval":
                text += "\nAnswer:"
                spellings = [[f" {letter}"] for letter in LETTERS]
            else:
                text = f"<start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\nAnswer: ("
                spellings = [[letter, f" {letter}"] for letter in LETTERS]
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                log_probs = model(ids).logits[0, -1].log_softmax(0)
            scores = [
                max(float(log_probs[tokenizer.convert_tokens_to_ids(s)]) for s in spelling)
                for spelling in spellings
            ]
            chosen = scores.index(max(scores))
            found[VARIANTS * place + number] = order[chosen] == row.answer
    return found


@pytest.mark.parametrize("protocol", ["dsg", "lm_eval"])
def test_outcomes_are_those_of_brute_force(toy, tmp_path, protocol):
    outcomes = run(toy, tmp_path, protocol).outcomes.read()
    assert outcomes == brute_force(protocol)
    # Neither always right nor always wrong.
    assert 10 < sum(outcomes.values()) < len(outcomes) - 10


def test_what_is_written(toy, tmp_path, monkeypatch):
    """Question 0 is always answered, question 1 never, question 2 only when it is asked."""

    def oracle(_, batch):
        place, number = batch.ids // VARIANTS, batch.ids % VARIANTS
        return {"correct": ((place == 0) | ((place == 2) & (number < 24))).double()}

    monkeypatch.setattr(question_filter, "score", oracle)
    run(toy, tmp_path)
    content = json.loads((tmp_path / "questions.json").read_text())
    assert content["protocol"] == "dsg"
    assert content["model"]["name"] == "model"
    assert content["model"]["num_layers"] == 3
    toy_set = content["sets"]["toy"]
    assert toy_set["n"] == 3
    assert toy_set["correct"] == toy_set["no_tricks"] == [ROWS[0].key, ROWS[2].key]
    assert toy_set["correct_iff_question"] == [ROWS[2].key]
    values = {row["metric"]: (row["value"], row["n"]) for row in read_results(tmp_path)}
    assert values == {
        "kept_correct": (pytest.approx(2 / 3, abs=1e-6), 3),
        "kept_correct_iff_question": (pytest.approx(1 / 3, abs=1e-6), 3),
        "kept_no_tricks": (pytest.approx(2 / 3, abs=1e-6), 3),
        "accuracy": (pytest.approx(2 / 3, abs=1e-6), 3),
    }
    evaluated = data(toy, keep=str(tmp_path))
    evaluated.setup("test")
    asked = {q.key for split in ("validation", "test") for q in evaluated.questions(split)}
    assert asked == {ROWS[0].key, ROWS[2].key}


FILES = ("questions.json", "results.jsonl")


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_several_ranks_equal_one(toy, tmp_path, num_ranks):
    # 144 variants in batches of 17: nine batches, the last of 8.
    run(toy, tmp_path / "one")
    run(toy, tmp_path / "several", devices=num_ranks, strategy="ddp_fork")
    for name in FILES:
        one, several = (tmp_path / folder / name for folder in ("one", "several"))
        assert one.read_bytes() == several.read_bytes()
    parts = list((tmp_path / "several" / "outcomes").glob("*.jsonl"))
    assert len(parts) == num_ranks


def test_a_killed_run_goes_on_where_it_was(toy, tmp_path):
    config = {
        "model": {
            "class_path": "lightning_modules.question_filter.QuestionFilterModule",
            "init_args": {"model_name": str(toy / "model")},
        },
        "data": {
            "class_path": "datamodules.multiple_choice.data.MultipleChoiceData",
            "init_args": {
                "model_name": str(toy / "model"),
                "protocol": "dsg",
                "batch_size": 17,
                "forget": [str(toy / "toy.jsonl")],
                "retain": [],
            },
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "logger": False},
    }
    kill = {"class_path": f"{__name__}.Kill", "init_args": {"number": 4}}
    killing = {"trainer": {"callbacks": [kill]}}
    for name, content in (("plain", config), ("killing", killing)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    words = ["validate", "-c", str(tmp_path / "plain.yaml")]
    cut = ["--run_dir", str(tmp_path / "cut")]
    killed = subprocess.run(
        [sys.executable, "-m", "dsg", *words, "-c", str(tmp_path / "killing.yaml"), *cut],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    outcomes = tmp_path / "cut" / "outcomes"
    assert len((outcomes / "1-0.jsonl").read_text().splitlines()) == 4
    assert not (tmp_path / "cut" / "questions.json").exists()

    assert main([*words, *cut, "--resume"]) == 0
    # What was answered before is not asked again.
    assert len((outcomes / "2-0.jsonl").read_text().splitlines()) == 5
    assert main([*words, "--run_dir", str(tmp_path / "whole")]) == 0
    for name in FILES:
        one, other = (tmp_path / folder / name for folder in ("cut", "whole"))
        assert one.read_bytes() == other.read_bytes()


def test_another_batch_size_continues_and_another_protocol_does_not(toy, tmp_path):
    with pytest.raises(RuntimeError, match="all 144 variants must be answered, got 51"):
        run(toy, tmp_path, limit_val_batches=3)
    run(toy, tmp_path, batch_size=10)
    run(toy, tmp_path / "whole")
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(UserError, match="protocol changed since"):
        run(toy, tmp_path, protocol="lm_eval")
