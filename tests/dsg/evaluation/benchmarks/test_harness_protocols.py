"""Our protocols are those of the real lm-evaluation-harness, question by question."""

import json
import socket
from importlib.resources import files
from types import SimpleNamespace

import lm_eval
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dsg.errors import UserError
from dsg.evaluation.benchmarks.harness import GuardedLM
from dsg.evaluation.benchmarks.multiple_choice.prompts import (
    ChoiceRow,
    cloze_question,
    lm_eval_question,
)
from dsg.evaluation.collate import question_collate
from dsg.evaluation.scoring import score_questions
from dsg.lm.tokens import uncounted_token_ids
from tests.guard_reference import make_guard
from tests.helpers import standard_sae, tiny_model

TASKS = files(lm_eval) / "tasks"
NUM_QUESTIONS = 26
_SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ha", "ki", "lo", "mu", "na", "pe", "ri", "so", "tu")
_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]


def _random_words(count: int, generator: torch.Generator) -> str:
    picks = torch.randint(len(_SYLLABLES), (count, 3), generator=generator).tolist()
    return " ".join("".join(_SYLLABLES[i] for i in word[: 1 + word[0] % 3]) for word in picks)


def make_rows() -> list[dict]:
    """Questions of 3 to 28 words with choices of 1 to 6, some with white space at the ends."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n in range(NUM_QUESTIONS):
        ends = ("", " ", "\n", "é ")[n % 4]
        question = f"{ends}{_random_words(3 + n, generator)}?{ends}"
        choices = [_random_words(1 + (n + i) % 6, generator) for i in range(4)]
        rows.append({"question": question, "choices": choices, "answer": n % 4})
    return rows


ROWS = make_rows()


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that merges across letters and spaces, with a bos token in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [json.dumps(row) + "\nA. B. C. D.\nAnswer: A B C D" for row in ROWS]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    names = ("pad_token", "eos_token", "bos_token", "unk_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict(zip(names, _SPECIAL, strict=True))
    )


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    calls = []

    def refuse(_socket, address):
        calls.append(address)
        raise OSError("there is no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not calls


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Model, tokenizer, and a folder of tasks over a local file, of the harness's own templates."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    local = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
    }
    wmdp = {"include": str(TASKS / "wmdp" / "wmdp_bio.yaml"), "task": "local_wmdp", **local}
    mmlu = {
        "include": str(TASKS / "mmlu" / "default" / "mmlu_human_aging.yaml"),
        "task": "local_mmlu",
        "fewshot_split": None,
        **local,
    }
    cloze = {
        "task": "local_cloze",
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "Question: {{question.strip()}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        **local,
    }
    free = {"task": "local_generation", "output_type": "generate_until", "test_split": "test"}
    free |= {"doc_to_text": "{{question}}", "doc_to_target": "{{choices[0]}}", **local}
    free["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": 5}
    rolling = {"task": "local_rolling", "output_type": "loglikelihood_rolling", **local}
    rolling |= {"test_split": "test", "doc_to_text": "", "doc_to_target": "{{question}}"}
    rolling["metric_list"] = [{"metric": "word_perplexity"}]
    for task in (wmdp, mmlu, cloze, free, rolling):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    tokenizer = bpe_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512)
    guard = make_guard(standard_sae(), [1, 12], uncounted_ids=uncounted_token_ids(tokenizer))
    return SimpleNamespace(model=model, tokenizer=tokenizer, guard=guard, folder=folder)


def ask_harness(bench, task: str, guard=None, **options):
    """Results of the harness, and its answers in the order of the questions."""
    results = lm_eval.simple_evaluate(
        model=GuardedLM(bench.model, bench.tokenizer, guard, batch_size=4),
        tasks=[task],
        task_manager=TaskManager(include_path=str(bench.folder), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    assert [sample["doc"]["question"] for sample in samples] == [row["question"] for row in ROWS]
    return results, [sample["filtered_resps"] for sample in samples]


def ask_ourselves(bench, make, subject: str, guard=None):
    rows = [ChoiceRow(subject, r["question"], tuple(r["choices"]), r["answer"]) for r in ROWS]
    collate = question_collate(bench.tokenizer)
    batches = [rows[start : start + 7] for start in range(0, len(rows), 7)]
    scored = [
        score_questions(bench.model, collate([make(row) for row in batch]), guard)
        for batch in batches
    ]
    return {name: torch.cat([values[name] for values in scored]) for name in scored[0]}


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize(
    ("task", "make", "subject"),
    [
        ("local_wmdp", lm_eval_question, "wmdp-bio"),
        ("local_mmlu", lm_eval_question, "human_aging"),
        ("local_cloze", cloze_question, "wmdp-bio"),
    ],
)
def test_every_answer_is_the_harness_s(bench, task, make, subject, guarded):
    guard = None
    if guarded:
        density = ask_ourselves(bench, make, subject, bench.guard)["density"]
        guard = bench.guard.replace(threshold=density.median().item())
    results, answers = ask_harness(bench, task, guard)
    ours = ask_ourselves(bench, make, subject, guard)
    for place, options in enumerate(answers):
        for option, (log_prob, _) in enumerate(options):
            assert ours[f"log_prob_{option}"][place].item() == pytest.approx(log_prob, abs=1e-4)
    metrics = results["results"][task]
    by_harness = [
        max(range(4), key=lambda i, options=options: options[i][0]) for options in answers
    ]
    right = sum(chosen == row["answer"] for chosen, row in zip(by_harness, ROWS, strict=True))
    assert 0 < right < NUM_QUESTIONS
    assert metrics["acc,none"] == right / NUM_QUESTIONS == ours["correct_plain"].mean().item()
    if task == "local_cloze":
        assert metrics["acc_norm,none"] == ours["correct_chars"].mean().item()
        assert not torch.equal(ours["correct_chars"], ours["correct_plain"])
    else:
        assert ours["chosen"].tolist() == by_harness
        assert torch.equal(ours["correct"], ours["correct_plain"])
    if guarded:
        assert 0.3 < ours["triggered"].mean() <= 0.5
        plain = ask_ourselves(bench, make, subject)["log_prob_0"]
        assert torch.equal(ours["log_prob_0"] != plain, ours["triggered"] > 0)


@pytest.mark.parametrize("task", ["local_generation", "local_rolling"])
def test_generation_and_perplexity_tasks_run_guarded(bench, task):
    guard = bench.guard.replace(threshold=0.8)
    results, answers = ask_harness(bench, task, guard)
    _, plain = ask_harness(bench, task)
    changed = sum(one != other for one, other in zip(answers, plain, strict=True))
    assert 0 < changed < NUM_QUESTIONS
    [described] = results["config"]["guards"]
    assert described["feature_ids"] == [1, 12]
    assert described["threshold"] == 0.8


def test_a_cache_of_answers_is_refused_under_a_guard(bench, tmp_path):
    cache = {"use_cache": str(tmp_path / "answers")}
    with pytest.raises(UserError, match="`use_cache` must be left out for a guarded model"):
        ask_harness(bench, "local_wmdp", bench.guard, **cache)
    assert ask_harness(bench, "local_wmdp", **cache)[1] == ask_harness(bench, "local_wmdp")[1]
