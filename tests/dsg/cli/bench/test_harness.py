"""`dsg bench harness` compares the same answers, and its numbers mean what they say."""

import argparse
import json
import multiprocessing
import subprocess
import sys
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from dsg.cli.bench import command as bench_command
from dsg.cli.bench import harness as bench
from dsg.cli.bench.harness import (
    Answered,
    Comparison,
    SideCost,
    Worker,
    answer_harness,
    answer_ours,
    compare,
)
from dsg.cli.bench.questions import Workload, random_model, random_questions, word_tokenizer
from dsg.cli.bench.tables import forget_highest_memory, highest_memory
from dsg.errors import UserError

LETTERS = Workload("letter", 5, d_model=16, num_layers=2, vocab_size=40, seed=0)
CLOZE = replace(LETTERS, kind="cloze")
COST = SideCost("ours", 4, {"1": 3.0, "4": 2.0}, 2.0, 1.5, 2.5, 1.6, 20_000_000)
COMPARISON = Comparison(
    "letter",
    64,
    replace(COST, side="harness", seconds=4.0, processor_seconds=4.8),
    COST,
    COST,
    2.0,
    1.6,
    2.4,
    1e-6,
    True,
)


def by_hand(workload: Workload) -> list[list[float]]:
    """Log-probability of each option, one text at a time."""
    model, tokenizer = random_model(workload), word_tokenizer(workload.vocab_size)
    scores = []
    for question in random_questions(workload):
        start = len(tokenizer(question.prompt)["input_ids"])
        row = []
        for option in question.options:
            ids = tokenizer(question.prompt + option)["input_ids"]
            with torch.no_grad():
                log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            row.append(sum(log_probs[t - 1, ids[t]].item() for t in range(start, len(ids))))
        scores.append(row)
    return scores


@pytest.mark.parametrize("workload", [LETTERS, CLOZE])
@pytest.mark.parametrize("answer", [answer_ours, answer_harness])
def test_both_sides_answer_the_same_questions_rightly(answer, workload):
    wanted = by_hand(workload)
    model, tokenizer = random_model(workload), word_tokenizer(workload.vocab_size)
    for batch_size in (1, 3, "auto"):
        found = answer(model, tokenizer, random_questions(workload), batch_size)
        assert found == [pytest.approx(row, abs=1e-5) for row in wanted]


def test_questions_are_as_long_as_said():
    tokenizer = word_tokenizer(200)
    for workload in (replace(LETTERS, vocab_size=200), replace(CLOZE, vocab_size=200)):
        questions = random_questions(replace(workload, num_questions=60))
        lengths = [len(tokenizer(q.prompt)["input_ids"]) for q in questions]
        assert 62 <= min(lengths) < 90  # 60 words, bos and `Answer:`
        assert 170 < max(lengths) <= 202
        assert len({q.prompt for q in questions}) == 60
        counts = {len(option.split()) for q in questions for option in q.options}
        assert counts == ({1} if workload.kind == "letter" else set(range(1, 9)))
    assert questions != random_questions(replace(CLOZE, vocab_size=200, num_questions=60, seed=1))


def test_the_vocabulary_weighs_about_as_much_as_gemma_2_2bs():
    def share(model):
        head = model.lm_head.weight.numel()
        layers = [p.numel() for p in model.model.layers.parameters() if p.ndim == 2]
        return head / (head + sum(layers))

    with torch.device("meta"):
        from transformers import Gemma2Config, Gemma2ForCausalLM

        ours = random_model(Workload("letter", 1, 256, 6, 8192, 0))
        # gemma-2-2b's shapes.
        theirs = Gemma2ForCausalLM(
            Gemma2Config(hidden_size=2304, intermediate_size=9216, num_attention_heads=8)
        )
    assert theirs.lm_head.weight.shape[0] == 256_000
    assert share(ours) == pytest.approx(share(theirs), abs=0.05)


class FakeWorker:
    """Takes known times, and writes down what it was asked."""

    seconds: ClassVar = {
        "harness": {1: 8.0, 2: 6.0, 4: 7.0, 8: 10.0},
        "ours": {1: 3.0, 2: 4.0, 4: 5.0},
    }
    asked: ClassVar[list] = []

    def __init__(self, side, workload):
        self.side, self.calls, self.searching = side, 0, len(self.asked) < 2
        assert workload is LETTERS

    def __enter__(self):
        self.asked.append((self.side, []))
        self.mine = self.asked[-1][1]
        return self

    def __exit__(self, *_):
        self.mine.append("end")

    def run(self, batch_size):
        self.calls += 1
        self.mine.append(batch_size)
        # Measured runs take longer each time, the first of them longest.
        slower = 0.0 if self.searching else 100.0 if self.calls == 1 else self.calls
        seconds = self.seconds[self.side][batch_size] + slower
        shift = 0.25 if self.side == "harness" else 0.0
        scores = [[shift, 1.0 + shift, 0.0, 0.0]] * 5
        return Answered(seconds, seconds / 2, scores, 1000 * self.calls * batch_size)


@pytest.fixture
def asked(monkeypatch):
    FakeWorker.asked = []
    monkeypatch.setattr(bench, "Worker", FakeWorker)
    return FakeWorker.asked


def test_each_side_is_measured_at_its_own_best_batch_size(asked):
    found = compare(LETTERS, [1, 2, 4, 8, 16], repeats=3, search_repeats=2)
    # Two rounds; a size that takes 1.5 times the best is the last, and not tried again.
    assert asked[0] == ("harness", [1, 2, 4, 8, 1, 2, 4, "end"])
    assert asked[1][0] == "ours"
    measured = [(side, calls[:-1]) for side, calls in asked[2:]]
    assert measured == [("harness", [2] * 4), ("ours", [1] * 4), ("ours", [2] * 4)]
    assert (found.harness.batch_size, found.ours.batch_size) == (2, 1)
    assert (found.ours_alike.side, found.ours_alike.batch_size) == ("ours", 2)
    # The first run warms up: 6 + 2, 3, 4 seconds against 3 + 2, 3, 4.
    assert (found.harness.lowest_seconds, found.harness.highest_seconds) == (8.0, 10.0)
    assert (found.harness.seconds, found.ours.seconds) == (9.0, 6.0)
    assert found.speed_ratio == 9 / 6
    assert (found.harness.processor_seconds, found.ours.processor_seconds) == (4.5, 3.0)
    assert (found.lowest_ratio, found.highest_ratio) == (10 / 7, 8 / 5)
    assert (found.harness.peak_bytes, found.ours.peak_bytes) == (8000, 4000)
    assert found.largest_difference == 0.25
    assert found.same_answers


def test_a_worker_answers_in_its_own_process_and_says_what_went_wrong():
    with Worker("ours", LETTERS) as worker:
        first, second = worker.run(2), worker.run(5)
        assert first.seconds > 0
        assert second.peak_bytes >= first.peak_bytes >= 0
        assert first.scores == [pytest.approx(row, abs=1e-5) for row in by_hand(LETTERS)]
        with pytest.raises(RuntimeError, match=r"(?s)batch size 0 failed.*must be at least 1"):
            worker.run(0)
        assert worker.run(2).scores == first.scores
        for process in multiprocessing.active_children():
            process.kill()
        with pytest.raises(RuntimeError, match="the process died"):
            worker.run(1)


def test_the_highest_memory_can_begin_anew():
    before = highest_memory()
    block = bytearray(64_000_000)
    raised = highest_memory()
    assert raised - before < len(block) * 1.2
    del block
    forget_highest_memory()
    low = highest_memory()
    block = bytearray(b"x") * 48_000_000
    assert 40_000_000 < highest_memory() - low < 60_000_000
    del block


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="dsg bench")
    bench_command.add_arguments(parser)
    return bench_command.run(parser.parse_args(["harness", *arguments]))


@pytest.fixture
def measured(monkeypatch):
    """Comparisons that are known beforehand; returns the calls that asked for them."""
    calls = []

    def give(workload, batch_sizes, repeats):
        calls.append((workload, batch_sizes, repeats))
        return replace(COMPARISON, kind=workload.kind)

    monkeypatch.setattr(bench, "compare", give)
    return calls


def test_tables_say_what_was_measured_and_a_run_directory_keeps_it(measured, tmp_path, capsys):
    assert run("--run_dir", str(tmp_path / "run")) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in (
        "2.00x as fast (1.60-2.40x; 3.00x in processor time)",
        "1.00x the memory",
        "│ 4 │ 4 │ 1.5-2.5 │ 16 │",
    ):
        assert text in printed, text
    assert [call[0].kind for call in measured] == ["letter", "cloze"]
    assert measured[0][0] == Workload("letter", 64, 256, 6, 8192, 0)
    assert measured[0][1:] == ([1, 2, 4, 8, 16, 32, 64], 7)
    found = json.loads((tmp_path / "run" / "bench.json").read_text(encoding="utf-8"))
    assert found["comparisons"][1]["harness"]["searched"] == {"1": 3.0, "4": 2.0}
    assert found["answers_agree"] is True
    with pytest.raises(UserError, match="already holds files"):
        run("--run_dir", str(tmp_path / "run"))


def test_fast_means_fewer_repeats_and_questions_unless_they_are_given(measured):
    run("--fast", "--repeats", "2", "--batch_sizes", "2", "auto")
    assert (measured[0][0].num_questions, *measured[0][1:]) == (16, [2, "auto"], 2)


@pytest.mark.parametrize("wrong", [{"same_answers": False}, {"largest_difference": 2e-4}])
def test_answers_that_must_agree_and_do_not_fail_the_command(wrong, monkeypatch, capsys):
    monkeypatch.setattr(bench, "compare", lambda *_: replace(COMPARISON, **wrong))
    assert run() == 1
    assert ("OTHER ANSWERS" in capsys.readouterr().out) is ("same_answers" in wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--questions", "0"], "--questions must be at least 1, got 0"),
        (["--vocab_size", "9"], "--vocab_size must be at least 10, got 9"),
        (["--d_model", "20"], "--d_model must be a multiple of 8, got 20; change it to 16"),
        (["--batch_sizes", "4", "2"], "--batch_sizes must ascend, `auto` last, got 4 2"),
        (["--batch_sizes", "auto", "2"], "--batch_sizes must ascend"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(arguments, message, measured):
    with pytest.raises(UserError, match=message):
        run(*arguments)
    assert not measured


def test_help_explains_every_option_without_torch():
    code = (
        "import argparse, sys; from dsg.cli.bench import command as bench\n"
        "parser = argparse.ArgumentParser(); bench.add_arguments(parser)\n"
        "try: parser.parse_args(['harness', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'lm_eval'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for option in ("--d_model", "--vocab_size", "--questions", "--batch_sizes", "--run_dir"):
        assert option in done.stdout
    assert "or 16 with --fast" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_a_tiny_run_of_the_whole_command(tmp_path):
    shapes = ["--d_model", "16", "--num_layers", "1", "--vocab_size", "60", "--questions", "6"]
    assert (
        run(*shapes, "--batch_sizes", "2", "4", "--repeats", "1", "--run_dir", str(tmp_path)) == 0
    )
    found = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert [one["same_answers"] for one in found["comparisons"]] == [True, True]
