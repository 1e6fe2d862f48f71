"""Every kind of run in bfloat16, float16 and float64 as a whole, with finite numbers."""

import math

import pytest
import torch
from safetensors.torch import load_file

from datamodules.mt_bench import MtBenchData
from datamodules.multiple_choice.data import MultipleChoiceData
from dsg.errors import UserError
from dsg.guard.guard import Guard
from dsg.guard.recipes import GuardSettings
from dsg.io.results import read_results
from dsg.objectives import NPO, RMU, SSD
from lightning_modules import (
    EvaluationModule,
    FinetuningModule,
    RelearningModule,
    SelectionModule,
    SequentialModule,
    UnlearningModule,
)
from lightning_modules.conversation import ConversationModule
from lightning_modules.question_filter import QuestionFilterModule
from tests.choice_data import choice_rows, save_choice_model, write_rows
from tests.conversations import save_chat_model, write_questions
from tests.dsg.evaluation.scoring_helpers import tiny_guard
from tests.helpers import HOOK_POINT, tiny_model, tiny_tokenizer
from tests.lightning_modules.odd_texts import OddTexts
from tests.lightning_modules.toy import ToyData, guard_settings, make_trainer

DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
RELOAD = {"reload_dataloaders_every_n_epochs": 1}


def evaluation(name, guard):
    return EvaluationModule(name, guard=guard), ToyData(), "test", {}


def attack(name, guard):
    module = RelearningModule(name, guard=guard, mode="train_time", maintenance=True, lr=1e-3)
    return module, ToyData(), "fit", {}


def lora_attack(name, guard):
    module = RelearningModule(
        name, guard=guard, mode="test_time", adapter="lora", lora_rank=2, lr=1e-3
    )
    return module, ToyData(), "fit", {}


def unlearning(name, _guard):
    module = UnlearningModule(name, NPO(), reference="frozen_copy", lr=1e-3)
    return module, ToyData("unlearning"), "fit", {}


def dampening(name, _guard):
    return UnlearningModule(name, SSD()), ToyData("unlearning"), "fit", {"max_epochs": 1}


def guarded_requests(name, guard):
    return SequentialModule(name, guard=guard), ToyData("requests"), "fit", RELOAD


def unlearnt_requests(name, _guard):
    module = SequentialModule(name, objective=RMU(HOOK_POINT, steering=5.0), lr=1e-3)
    return module, ToyData("requests"), "fit", RELOAD


def finetuning(name, _guard):
    return FinetuningModule(name, lr=1e-3), ToyData(), "fit", {"num_sanity_val_steps": 0}


RUNS = [
    evaluation,
    attack,
    lora_attack,
    unlearning,
    dampening,
    guarded_requests,
    unlearnt_requests,
    finetuning,
]


def execute(make, toy, run_dir, precision):
    module, data, stage, options = make(str(toy / "model"), guard_settings(toy))
    trainer = make_trainer(run_dir, **{"precision": precision, "max_epochs": 2, **options})
    if stage == "fit":
        trainer.fit(module, data)
    else:
        getattr(trainer, stage)(module, data, verbose=False)
    return module


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("make", RUNS)
def test_runs_end_with_finite_numbers(toy, tmp_path, make, precision):
    if precision == "16-true" and make is not evaluation:
        module, *_ = make(str(toy / "model"), guard_settings(toy))
        with pytest.raises(UserError, match="`precision` must not be '16-true'"):
            execute(make, toy, tmp_path, precision)
        assert module.model is None
        return
    module = execute(make, toy, tmp_path, precision)
    if make is not lora_attack:
        assert {weight.dtype for weight in module.parameters()} == {DTYPES[precision]}
    if make is finetuning:
        weights = load_file(tmp_path / "model" / "model.safetensors").values()
        assert all(bool(weight.isfinite().all()) for weight in weights)
        return
    rows = read_results(tmp_path)
    numbers = [row for row in rows if row["metric"] in ("accuracy", "perplexity", "trigger_rate")]
    assert numbers
    assert all(row["value"] is not None and math.isfinite(row["value"]) for row in numbers)


@pytest.mark.parametrize("precision", DTYPES)
def test_a_selection_is_made_in_it(toy, tmp_path, precision):
    guard = guard_settings(toy, num_features=4)
    module = SelectionModule(str(toy / "model"), guard=guard)
    make_trainer(tmp_path, precision=precision).validate(module, OddTexts(), verbose=False)
    assert {weight.dtype for weight in module.parameters()} == {DTYPES[precision]}
    made = Guard.load(tmp_path / "guard")
    assert math.isfinite(made.threshold)
    assert all(row["value"] is not None for row in read_results(tmp_path))


@pytest.mark.parametrize("precision", DTYPES)
def test_a_question_filter_asks_in_it(tmp_path, precision):
    name = str(tmp_path / "model")
    save_choice_model(tmp_path / "model")
    write_rows(tmp_path / "toy.jsonl", choice_rows(1))
    module = QuestionFilterModule(name)
    made = MultipleChoiceData(name, [str(tmp_path / "toy.jsonl")], [], batch_size=64)
    make_trainer(tmp_path / "run", precision=precision).validate(module, made, verbose=False)
    assert {weight.dtype for weight in module.parameters()} == {DTYPES[precision]}
    assert len(module.outcomes.read()) > 0


@pytest.mark.parametrize("precision", DTYPES)
def test_conversations_are_held_in_it(tmp_path, precision):
    questions = write_questions(tmp_path / "question.jsonl", 2)
    name = str(save_chat_model(tmp_path / "model"))
    tiny_guard(tiny_model(), tiny_tokenizer(), 0.7).save(tmp_path / "guard")
    guard = GuardSettings(HOOK_POINT, "unused", artifact=str(tmp_path / "guard"))
    module = ConversationModule(name, guard=guard, max_new_tokens=4)
    data = MtBenchData(name, str(questions), batch_size=2)
    make_trainer(tmp_path / "run", precision=precision).test(module, data, verbose=False)
    assert {weight.dtype for weight in module.parameters()} == {DTYPES[precision]}
    assert (tmp_path / "run" / "answers_on.jsonl").read_text()


def test_the_frequencies_of_rotary_positions_keep_their_precision(toy, tmp_path):
    module = execute(evaluation, toy, tmp_path, "bf16-true")
    buffers = dict(module.model.named_buffers())
    expected = dict(tiny_model().named_buffers())
    for name in expected:
        assert torch.equal(buffers[name], expected[name])


def test_float64_agrees_with_float32(toy, tmp_path):
    for precision in ("32-true", "64-true"):
        execute(evaluation, toy, tmp_path / precision, precision)
    single, double = (read_results(tmp_path / name) for name in ("32-true", "64-true"))
    for one, other in zip(single, double, strict=True):
        assert one["value"] == pytest.approx(other["value"], rel=1e-4, abs=1e-6)
