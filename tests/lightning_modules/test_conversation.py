"""MT-Bench end to end: a tiny guarded model, a judge behind a local server, one to three ranks."""

import hashlib
import json
import math

import pytest
from lightning.pytorch.loggers import CSVLogger

from datamodules.mt_bench import MtBenchData
from dsg.errors import UserError
from dsg.evaluation.benchmarks.mt_bench.conversations import hold
from dsg.evaluation.benchmarks.mt_bench.judge import JudgeSettings
from dsg.evaluation.compare import compare_runs
from dsg.evaluation.items_file import read_items
from dsg.guard.recipes import GuardSettings
from dsg.io.results import read_results, read_run_facts
from lightning_modules.conversation import ConversationModule
from tests.conversations import save_chat_model, write_questions
from tests.dsg.evaluation.scoring_helpers import tiny_guard
from tests.helpers import HOOK_POINT, tiny_model, tiny_tokenizer
from tests.judge_server import Reply, judge_server
from tests.lightning_modules.toy import make_trainer

NUM, STATES, TURNS = 7, 2, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_chat_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """A saved guard that triggers on some conversations."""
    folder = tmp_path_factory.mktemp("guard") / "guard"
    tiny_guard(tiny_model(), tiny_tokenizer(), 0.7).save(folder)
    return str(folder)


def by_text(request, number):
    """A rating that depends on the request alone."""
    del number
    text = request["messages"][-1]["content"]
    return Reply(f"Rating: [[{1 + hashlib.sha256(text.encode()).digest()[0] % 10}]]")


def run(tmp_path, model, guard, judge, name="run", trainer=None, **changes):
    questions = write_questions(tmp_path / "question.jsonl", NUM)
    module = ConversationModule(
        model,
        guard=GuardSettings(HOOK_POINT, "unused", artifact=guard) if guard else None,
        judge=judge,
        max_new_tokens=6,
        **changes,
    )
    data = MtBenchData(model, str(questions), batch_size=2)
    make_trainer(tmp_path / name, **(trainer or {})).test(module, data, verbose=False)
    return tmp_path / name


def judged_by(server, **changes):
    return JudgeSettings(
        **{"model": "stub", "base_url": server.url, "max_retries": 0, "repeats": 2, **changes}
    )


def test_rows_items_and_files(tmp_path, model, guard):
    with judge_server(by_text) as server:
        folder = run(tmp_path, model, guard, judged_by(server), seed=3)
    rows = read_results(folder)
    scores = {(r["guard"], r["domain"], r["metric"]): r for r in rows if "/" in r["protocol"]}
    items = {(item["guard"], item["id"]): item for item in read_items(folder)}
    assert len(items) == NUM * STATES
    for state in ("off", "on"):
        ratings = [items[state, index]["rating"] for index in range(NUM)]
        score = scores[state, "mt_bench", "mt_bench"]
        assert score["value"] == pytest.approx(sum(ratings) / NUM, rel=1e-5)
        assert score["low"] < score["value"] < score["high"]
        assert (score["n"], score["seed"], score["dataset"]) == (NUM, 3, "mt_bench")
        assert scores[state, "mt_bench", "judge_failures"]["value"] == 0
        assert scores[state, "mt_bench", "judge_failures"]["n"] == NUM * TURNS * 2
        assert scores[state, "mt_bench", "mt_bench_repeat_sd"]["value"] == 0  # the stub is constant
        assert {"math", "writing", "roleplay"} <= {key[1] for key in scores}
        lines = (folder / f"answers_{state}.jsonl").read_text().splitlines()
        first = json.loads(lines[0])
        assert "\n\n".join(first["choices"][0]["turns"]) == items[state, 0]["text"]
    rates = {(r["guard"], r["protocol"]): r["value"] for r in rows if r["metric"] == "trigger_rate"}
    assert rates.keys() == {("on", "turn_1"), ("on", "turn_2")}
    assert 0 < min(rates.values()) <= max(rates.values()) < 1
    facts = read_run_facts(folder)["judge"]
    assert (facts["model"], facts["repeats"], facts["failures"]) == ("stub", 2, [])
    assert facts["prompts"] == scores["on", "mt_bench", "mt_bench"]["protocol"].split("/")[1]
    assert facts["turns_graded_with_reference"] == 2 * TURNS
    [comparison] = [
        found
        for found in compare_runs(folder, folder, guards=("off", "on"))[0]
        if (found.domain, found.metric) == ("mt_bench", "rating")
    ]
    assert comparison.test.n == NUM


def test_the_answers_are_those_of_the_model_and_its_guard(tmp_path, model, guard):
    folder = run(tmp_path, model, guard, None)
    data = MtBenchData(model, str(tmp_path / "question.jsonl"))
    data.setup("test")
    plain = tiny_model()
    saved = tiny_guard(plain, data.tokenizer, 0.7)
    items = {(item["guard"], item["id"]): item for item in read_items(folder)}
    differ = 0
    for conversation in data.conversations():
        said = []
        for state, attached in (("off", None), ("on", saved)):
            [answers], _ = hold(plain, data.tokenizer, [conversation], 6, attached)
            assert items[state, conversation.id]["text"] == "\n\n".join(answers)
            said.append(answers)
        differ += said[0] != said[1]
    assert 0 < differ < NUM
    assert not (folder / "judgements.jsonl").exists()
    assert "rating" not in items["on", 0]


def test_equal_answers_are_judged_once_and_a_second_run_asks_nothing(tmp_path, model, guard):
    with judge_server(by_text) as server:
        folder = run(tmp_path, model, guard, judged_by(server))
        first = (folder / "results.jsonl").read_bytes()
        asked = [request["messages"][0]["content"] for request in server.requests]
        # Each repeat asks once; untriggered turns are the same in both states.
        assert len(asked) == 2 * len(set(asked))
        assert len(set(asked)) < NUM * STATES * TURNS
        run(tmp_path, model, guard, judged_by(server))
        assert len(server.requests) == len(asked)
    assert (folder / "results.jsonl").read_bytes() == first


def test_failed_judgements_are_counted_and_made_up_for(tmp_path, model):
    def stumbling(request, number):
        if number == 0:
            return Reply(status=500)
        return Reply("no idea") if number in (1, 2) else by_text(request, number)

    with judge_server(stumbling) as server:
        judge = judged_by(server, repeats=1, concurrency=1, max_attempts=2)
        folder = run(tmp_path, model, None, judge)
        [failures] = [r for r in read_results(folder) if r["metric"] == "judge_failures"]
        assert (failures["guard"], failures["value"], failures["n"]) == ("none", 2, NUM * TURNS)
        reasons = read_run_facts(folder)["judge"]["failures"]
        assert len(reasons) == 2
        assert reasons[1] == "no rating"
        before = len(server.requests)
        run(tmp_path, model, None, judge)
        assert len(server.requests) == before + 2
    [failures] = [r for r in read_results(folder) if r["metric"] == "judge_failures"]
    assert failures["value"] == 0


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_several_ranks_equal_one(tmp_path, model, guard, num_ranks):
    # 7 conversations in batches of 2: 4 batches, which neither 2 nor 3 ranks share evenly.
    several = {"devices": num_ranks, "strategy": "ddp_fork"}
    with judge_server(by_text) as server:
        one = run(tmp_path, model, guard, judged_by(server), "one")
        more = run(tmp_path, model, guard, judged_by(server), "several", several)
    for name in ("results.jsonl", "answers_on.jsonl", "answers_off.jsonl", "items.parquet"):
        assert (one / name).read_bytes() == (more / name).read_bytes()


def test_nothing_is_logged_but_numbers(tmp_path, model, guard):
    with judge_server(by_text) as server:
        logger = CSVLogger(tmp_path / "log", name="", version="")
        run(tmp_path, model, guard, judged_by(server), trainer={"logger": logger})
    header, values = (tmp_path / "log" / "metrics.csv").read_text().splitlines()
    logged = dict(zip(header.split(","), values.split(","), strict=True))
    assert "test/mt_bench/guard_on/mt_bench" in logged
    assert all(math.isfinite(float(value)) for value in logged.values())


def test_a_judge_that_cannot_be_asked_stops_the_run_at_once(tmp_path, model):
    judge = JudgeSettings(model="stub", base_url="http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(UserError, match="must reply before answers are generated"):
        run(tmp_path, model, None, judge)
    assert not (tmp_path / "run" / "results.jsonl").exists()


def test_too_long_answers_are_refused(tmp_path, model):
    questions = write_questions(tmp_path / "question.jsonl")
    data = MtBenchData(model, str(questions))
    with pytest.raises(UserError, match="share 128 positions, got 100"):
        make_trainer(tmp_path).test(ConversationModule(model, max_new_tokens=100), data)
    with pytest.raises(UserError, match="must be at least 1, got 0"):
        make_trainer(tmp_path).test(ConversationModule(model, max_new_tokens=0), data)
