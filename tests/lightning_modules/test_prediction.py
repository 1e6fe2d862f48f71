"""Predictions: against one text at a time, on several ranks, killed in the middle, bad input."""

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

from datamodules.mt_bench import MtBenchData
from datamodules.predictions.data import ItemTextsData, TextRowsData
from datamodules.tiny_world.data import TinyWorldData
from dsg.cli.main import main
from dsg.errors import UserError
from dsg.guard.recipes import GuardSettings
from dsg.io.results import read_results
from lightning_modules.prediction import PredictionModule
from tests.conversations import chat_tokenizer, save_chat_model, write_questions
from tests.dsg.evaluation.scoring_helpers import tiny_guard
from tests.helpers import EOS, HOOK_POINT, PAD, standard_sae, tiny_model, tiny_tokenizer
from tests.lightning_modules.toy import make_trainer, texts

ROOT = Path(__file__).parents[2]
NUM, NEW = 13, 7


class Kill(lightning.Callback):
    """Ends the process without any warning before batch `number`."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_predict_batch_start(self, *arguments):
        _, _, _, batch_idx, *_ = arguments
        if batch_idx == self.number:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Folder with a model that has a chat template, a guard and an odd number of texts."""
    folder = tmp_path_factory.mktemp("prediction")
    save_chat_model(folder / "model")
    tiny_guard(tiny_model(), tiny_tokenizer(), 0.6).save(folder / "guard")
    rows = [
        {"id": f"text {place}", "text": text, "domain": ("forget", "retain")[place % 2]}
        for place, text in enumerate(texts(NUM, 5, 0, 26))
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(toy):
    return GuardSettings(HOOK_POINT, "unused", artifact=str(toy / "guard"))


def predict(toy, run_dir, source="texts.jsonl", data=None, trainer=None, model="model", **changes):
    module = PredictionModule(
        str(toy / model), settings(toy), **{"continuations": True, "max_new_tokens": NEW, **changes}
    )
    data = data or TextRowsData(str(toy / model), str(toy / source), batch_size=4)
    make_trainer(run_dir, **(trainer or {})).predict(module, data, return_predictions=False)
    return read(run_dir)


def read(run_dir):
    lines = (run_dir / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def brute_force(text):
    """Fired and counted tokens of a text, in float64."""
    ids = tiny_tokenizer()(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = tiny_model().double()(ids, output_hidden_states=True).hidden_states
        acts = standard_sae(seed=3).double().encode(hidden[2])[0, :, [0, 5]]
    counted = [token_id > EOS + 1 for token_id in ids[0].tolist()]
    fired = [bool(row.max() > 0) and counts for row, counts in zip(acts, counted, strict=True)]
    return sum(fired), sum(counted)


def continue_alone(text, guard):
    """A text's continuation by `generate`, one text at a time."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    if guard is None:
        output = model.generate(**inputs, **options)
    else:
        with guard.attached(model, decision="prompt"):
            output = model.generate(**inputs, **options)
    said = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokenizer.decode([*said, EOS][: [*said, EOS].index(EOS)], skip_special_tokens=True)


def test_rows_are_those_of_one_text_at_a_time(toy, tmp_path):
    rows = predict(toy, tmp_path)
    given = [json.loads(line) for line in (toy / "texts.jsonl").read_text().splitlines()]
    guard = tiny_guard(tiny_model(), tiny_tokenizer(), 0.6)
    assert [row["id"] for row in rows] == [one["id"] for one in given]
    for row, one in zip(rows, given, strict=True):
        fired, counted = brute_force(one["text"])
        assert (row["num_fired"], row["num_counted"]) == (fired, counted)
        assert row["statistic"] == fired / counted
        assert row["threshold"] == 0.6
        assert row["triggered"] == (fired / counted > 0.6)
        assert row["domain"] == one["domain"]
        assert row["num_tokens"] == 1 + len(one["text"].split())
        assert not row["truncated"]
        assert row["continuation_off"] == continue_alone(one["text"], None)
        assert row["continuation_on"] == continue_alone(one["text"], guard)
    assert {row["triggered"] for row in rows} == {True, False}
    changed = sum(row["continuation_on"] != row["continuation_off"] for row in rows)
    assert 0 < changed < NUM
    measured = {(row["domain"], row["metric"]): row for row in read_results(tmp_path)}
    for domain, n in (("forget", 7), ("retain", 6)):
        rate = measured[domain, "trigger_rate"]
        share = sum(row["triggered"] for row in rows if row["domain"] == domain) / n
        assert (rate["value"], rate["n"]) == (pytest.approx(share, abs=1e-6), n)
        assert rate["low"] < rate["value"] < rate["high"]


def test_batches_of_one_and_no_continuations(toy, tmp_path):
    expected = predict(toy, tmp_path / "four", continuations=False)
    data = TextRowsData(str(toy / "model"), str(toy / "texts.jsonl"), batch_size=1)
    assert predict(toy, tmp_path / "one", data=data, continuations=False) == expected
    assert not any(name.startswith("continuation") for name in expected[0])


def test_a_model_that_ends_at_once_says_nothing(toy, tmp_path):
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    model.save_pretrained(tmp_path / "model")
    chat_tokenizer().save_pretrained(tmp_path / "model")
    rows = predict(toy, tmp_path / "run", model=tmp_path / "model")
    said = {row[f"continuation_{state}"] for row in rows for state in ("off", "on")}
    assert said == {""}


def test_several_ranks_equal_one(toy, tmp_path):
    # 13 texts in batches of 4: four batches, the last of one text.
    predict(toy, tmp_path / "one")
    predict(toy, tmp_path / "three", trainer={"devices": 3, "strategy": "ddp_fork"})
    for name in ("predictions.jsonl", "results.jsonl"):
        one, three = (tmp_path / folder / name for folder in ("one", "three"))
        assert one.read_bytes() == three.read_bytes()


def test_a_killed_run_goes_on_on_two_ranks(toy, tmp_path):
    config = {
        "model": {
            "class_path": "lightning_modules.PredictionModule",
            "init_args": {
                "model_name": str(toy / "model"),
                "continuations": True,
                "max_new_tokens": NEW,
                "guard": vars(settings(toy)),
            },
        },
        "data": {
            "class_path": "datamodules.TextRowsData",
            "init_args": {
                "model_name": str(toy / "model"),
                "source": str(toy / "texts.jsonl"),
                "batch_size": 4,
            },
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "logger": False},
    }
    kill = {"class_path": f"{__name__}.Kill", "init_args": {"number": 1}}
    killing = {"trainer": {"callbacks": [kill]}}
    for name, content in (("plain", config), ("killing", killing)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))

    def dsg(*words):
        return subprocess.run(
            [sys.executable, "-m", "dsg", "predict", "-c", str(tmp_path / "plain.yaml"), *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=180,
        )

    cut = ["--run_dir", str(tmp_path / "cut")]
    killed = dsg("-c", str(tmp_path / "killing.yaml"), *cut)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    journal = tmp_path / "cut" / "outcomes"
    assert len((journal / "1-0.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "cut" / "predictions.jsonl").exists()
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    resumed = dsg(*cut, "--resume", *ranks)
    assert resumed.returncode == 0, resumed.stderr
    # What was written before is not found out again.
    lines = [len((journal / f"2-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert lines == [1, 2]
    said = " ".join(resumed.stdout.split())
    assert said.count("forget trigger rate 7 0.") == 1
    assert f"{tmp_path / 'cut' / 'predictions.jsonl'} a row per text" in said
    predict(toy, tmp_path / "whole")
    for name in ("predictions.jsonl", "results.jsonl"):
        one, other = (tmp_path / folder / name for folder in ("cut", "whole"))
        assert one.read_bytes() == other.read_bytes()


def test_another_guard_or_text_is_not_continued(toy, tmp_path):
    with pytest.raises(UserError, match=r"all 13 texts must be read .* got 4; leave limit_pr"):
        predict(toy, tmp_path, trainer={"limit_predict_batches": 1})
    with pytest.raises(UserError, match="but new tokens changed since"):
        predict(toy, tmp_path, max_new_tokens=NEW + 1)
    assert len(predict(toy, tmp_path)) == NUM


def test_long_texts_are_cut_and_it_is_said(toy, tmp_path, caplog):
    data = TextRowsData(str(toy / "model"), str(toy / "texts.jsonl"), max_length=8, batch_size=4)
    rows = predict(toy, tmp_path, data=data, continuations=False)
    given = [json.loads(line)["text"].split() for line in (toy / "texts.jsonl").open()]
    long = [len(words) > 7 for words in given]
    assert [row["truncated"] for row in rows] == long
    assert 0 < sum(long) < NUM
    for row, words in zip(rows, given, strict=True):
        fired, counted = brute_force(" ".join(words[:7]))
        assert (row["num_fired"], row["num_counted"]) == (fired, counted)
    assert f"{sum(long)} of {NUM} texts have more than 8 tokens" in caplog.text


def test_plain_text_and_conversations(toy, tmp_path):
    (tmp_path / "plain.txt").write_text("w1 w2\nw3\n\n\n  \nw4 w5\r\n\r\nw6\n")
    rows = predict(toy, tmp_path / "plain", tmp_path / "plain.txt")
    assert [(row["id"], row["domain"], row["num_counted"]) for row in rows] == [
        ("0", "all", 3),
        ("1", "all", 2),
        ("2", "all", 1),
    ]
    messages = [
        ["w1 w2"],
        ["w1", "w2", "w3"],
        [{"role": "user", "content": "w1 w2"}],
    ]
    lines = "".join(json.dumps({"said": said}) + "\n" for said in messages)
    (tmp_path / "chat.jsonl").write_text(lines)
    data = TextRowsData(str(toy / "model"), str(tmp_path / "chat.jsonl"), column="said")
    rows = predict(toy, tmp_path / "chat", data=data)
    for row, text in zip(rows, ("w24 w1 w2 w25", "w24 w1 w25 w2 w24 w3 w25"), strict=False):
        fired, counted = brute_force(text)
        assert (row["num_fired"], row["num_counted"]) == (fired, counted)
        assert row["continuation_off"] == continue_alone(text, None)
    assert {**rows[2], "id": "0"} == rows[0]


def test_items_of_other_data_modules(toy, tmp_path):
    world = TinyWorldData(str(toy / "model"))
    rows = predict(toy, tmp_path / "world", data=ItemTextsData(world), continuations=False)
    assert len(rows) == len(world.questions("test")) + len(world.passages("test"))
    assert {"forget", "near", "retain"} <= {row["domain"] for row in rows}
    bench = MtBenchData(str(toy / "model"), str(write_questions(tmp_path / "question.jsonl", 3)))
    rows = predict(toy, tmp_path / "bench", data=ItemTextsData(bench))
    assert [row["domain"] for row in rows] == ["writing", "roleplay", "math"]
    first = bench.conversations()[0].turns[0]
    assert rows[0]["continuation_off"] == continue_alone(f"w24 {first} w25", None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "must hold at least one row, got none"),
        ("empty.txt", " \n\n ", "is empty; give one with text"),
        ("missing.txt", None, "cannot be read"),
        ("missing.jsonl", None, "cannot be read"),
        ("blank.jsonl", '{"text": "w1"}\n{"text": " "}\n', "row 2 of .* got a blank one; mend it"),
        ("number.jsonl", '{"text": 3}\n', "a text or a list of messages in 'text', got int"),
        ("column.jsonl", '{"txt": "w1"}\n', "has no column 'text', only .*'txt'.*; set `column`"),
        ("some.jsonl", '{"text": "w1", "id": 1}\n{"text": "w2"}\n', "an `id`, or none, got 1 of 2"),
        ("ids.jsonl", '{"text": "w1", "id": 1}\n' * 2, "must differ, got '1' 2 times"),
        ("odd.jsonl", '{"text": ["w1", "w2"]}\n', "first and last, got 2 messages"),
        (
            "role.jsonl",
            '{"text": [{"role": "system", "content": "w1"}]}\n',
            "got the role 'system' in message 1",
        ),
        ("long.jsonl", json.dumps({"text": ["w1 " * 200]}), "must have at most 121, to stay whole"),
    ],
)
def test_bad_texts_are_refused_in_one_sentence(toy, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        predict(toy, tmp_path / "run", tmp_path / name)
    assert not (tmp_path / "run").exists()


def test_bad_settings_are_refused(toy, tmp_path):
    with pytest.raises(UserError, match="`max_new_tokens` must be at least 1, got 0"):
        PredictionModule(str(toy / "model"), settings(toy), max_new_tokens=0)
    with pytest.raises(UserError, match=r"`max_length` must be from 1 to 121, .* got 122"):
        predict(
            toy,
            tmp_path,
            data=TextRowsData(str(toy / "model"), str(toy / "texts.jsonl"), max_length=122),
        )
    with pytest.raises(UserError, match="`of` must be a data module of an evaluation, got Light"):
        ItemTextsData(lightning.LightningDataModule())


def test_what_is_missing_is_one_line(toy, tmp_path, capsys):
    def error_of(module, data, command="predict"):
        words = [f"--model=lightning_modules.{module}", f"--model.model_name={toy / 'model'}"]
        words += [f"--data=datamodules.{data}", f"--data.model_name={toy / 'model'}"]
        if data == "TextRowsData":
            words.append(f"--data.source={toy / 'texts.jsonl'}")
        if module == "PredictionModule" and command == "test":
            words += ["--model.guard.hook_point", HOOK_POINT, "--model.guard.sae", "unused"]
            words += ["--model.guard.artifact", str(toy / "guard")]
        assert main([command, *words, "--run_dir", str(tmp_path / "run")]) == 2
        assert not (tmp_path / "run").exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "guard.hook_point" in error_of("PredictionModule", "TextRowsData")
    assert "predict" in error_of("EvaluationModule", "TextRowsData")
    assert "test_step" in error_of("PredictionModule", "TextRowsData", "test")


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_predictions_in_another_precision(toy, tmp_path, precision):
    rows = predict(toy, tmp_path, trainer={"precision": precision})
    assert len(rows) == NUM
    assert all(0.0 <= row["statistic"] <= 1.0 for row in rows)
