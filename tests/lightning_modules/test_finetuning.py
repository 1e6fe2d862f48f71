"""Fine-tuning: what is learnt, what is saved, what a resumed run ends with."""

import math

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from datamodules.tofu.data import TofuData
from dsg.errors import UserError
from dsg.lm.pretrained import load_model
from dsg.lm.tokens import TokenBatch
from lightning_modules.finetuning import FinetuningModule, lr_factor
from tests.benchmark_folders import write_tofu
from tests.helpers import BOS, EOS, tiny_model
from tests.lightning_modules.toy import ToyData, make_trainer, texts


def fit(toy, run_dir, data=None, epochs=2, ckpt_path=None, trainer=None, **settings):
    module = FinetuningModule(str(toy / "model"), **{"lr": 1e-2, **settings})
    options = {"max_epochs": epochs, "gradient_clip_val": 1.0, **(trainer or {})}
    make_trainer(run_dir, **options).fit(module, data or ToyData(), ckpt_path=ckpt_path)
    return module


def loss_of(model, toy):
    """Mean loss per text of what ToyData trains on."""
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    losses = []
    for text in texts(10, 30, 0, 8):
        ids = torch.tensor(tokenizer([text])["input_ids"])
        with torch.no_grad():
            losses.append(float(model(ids, labels=ids).loss))
    return sum(losses) / len(losses)


def test_a_model_learns_the_text_and_is_saved_as_an_ordinary_folder(toy, tmp_path):
    module = fit(toy, tmp_path, epochs=8)
    folder = tmp_path / "model"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in load_file(folder / "model.safetensors").items():
        assert torch.equal(weight, loaded.get_parameter(name))
        assert torch.equal(weight, module.model.get_parameter(name))
    assert loss_of(loaded, toy) < 0.7 * loss_of(tiny_model(), toy)
    assert AutoTokenizer.from_pretrained(folder)(["w3"])["input_ids"] == [[BOS, 7]]


def test_an_adapter_is_saved_unmerged_and_the_base_stays(toy, tmp_path):
    module = fit(toy, tmp_path, epochs=8, adapter="lora", lora_rank=4, lr=5e-2)
    assert (tmp_path / "model" / "adapter_model.safetensors").is_file()
    loaded = load_model(str(tmp_path / "model"))
    assert loss_of(loaded, toy) == pytest.approx(loss_of(module.model, toy), abs=1e-5)
    assert loss_of(loaded, toy) < 0.9 * loss_of(tiny_model(), toy)
    plain = tiny_model()
    for name, weight in module.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(weight, plain.get_parameter(name.replace(".base_layer", "")))


def test_only_marked_tokens_are_learnt(toy):
    """The loss is the mean over the tokens of the mask, the closing eos among them."""
    module = FinetuningModule(str(toy / "model"))
    module.model, module.log = tiny_model(), lambda *_, **__: None
    ids = torch.tensor([[BOS, 4, 5, 6, EOS], [BOS, 7, 8, EOS, 0]])
    learnt = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 0]]).bool()
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    loss = module.training_step(TokenBatch(ids, real, learnt), 0)
    expected = []
    for row, count, places in ((ids[0], 5, (3, 4)), (ids[1], 4, (2, 3))):
        log_probs = module.model(row[None, :count]).logits[0].double().log_softmax(-1)
        expected += [-float(log_probs[place - 1, row[place]].detach()) for place in places]
    assert float(loss.detach()) == pytest.approx(sum(expected) / 4, abs=1e-5)


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_resumed_run_ends_with_the_same_weights(toy, tmp_path, adapter, step):
    options = {"adapter": adapter, "schedule": "linear", "warmup_fraction": 0.5}
    every_step = ModelCheckpoint(
        tmp_path / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1
    )
    watched = {"enable_checkpointing": True, "callbacks": [every_step]}
    whole = fit(toy, tmp_path / "whole", trainer=watched, **options)
    # The base model is no part of an adapter's checkpoint.
    checkpoint = tmp_path / "checkpoints" / f"step={step}.ckpt"
    names = set(torch.load(checkpoint, weights_only=False)["state_dict"])
    assert names == {name for name, weight in whole.named_parameters() if weight.requires_grad}
    resumed = fit(toy, tmp_path / "resumed", ckpt_path=checkpoint, **options)
    for (name, weight), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_another_runs_checkpoint_is_refused(toy, tmp_path):
    saving = ModelCheckpoint(tmp_path / "checkpoints", "last")
    watched = {"enable_checkpointing": True, "callbacks": [saving]}
    fit(toy, tmp_path, epochs=1, trainer=watched)
    with pytest.raises(UserError, match=r"`lr` was 0\.01 there and is 0\.02 here"):
        fit(toy, tmp_path, lr=0.02, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
    ],
)
def test_learning_rates(schedule, expected):
    assert [lr_factor(step, 8, 0.5, schedule) for step in range(8)] == expected
    assert lr_factor(0, 8, 0.0, schedule) == 1.0


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        # Three batches an epoch, so two steps of two batches.
        ({"accumulate_grad_batches": 2}, [0.01, 0.0075, 0.005, 0.0025]),
        ({"max_epochs": -1, "max_steps": 2}, [0.01, 0.005]),
        ({"max_epochs": 1}, [0.01, 0.01 * 2 / 3, 0.01 / 3]),
    ],
)
def test_learning_rate_falls_to_nothing_at_the_end_of_the_run(toy, tmp_path, trainer, expected):
    rates = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(toy, tmp_path, trainer={**trainer, "callbacks": [Watch()]}, schedule="linear")
    assert list(dict.fromkeys(rates)) == pytest.approx(expected)


def test_a_run_must_have_an_end(toy, tmp_path):
    with pytest.raises(UserError, match="`max_epochs` must be at least 1, got -1 without"):
        fit(toy, tmp_path, epochs=-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "`lr` must be positive and finite, got 0.0"),
        ({"lr": math.inf}, "`lr` must be positive and finite, got inf"),
        ({"warmup_fraction": 1.0}, r"`warmup_fraction` must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        FinetuningModule("model", **settings)


def test_a_taught_model_answers_and_stops(toy, tmp_path):
    """TOFU's pairs, learnt by heart, come back word for word and end where they should."""
    write_tofu(tmp_path / "TOFU", 2)
    data = TofuData(str(toy / "model"), dataset=str(tmp_path / "TOFU"), train_batch_size=4)
    fit(toy, tmp_path / "run", data, epochs=60)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    for prompt, answer in data.texts.written("full"):
        ids = torch.tensor(tokenizer([prompt])["input_ids"])
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False
        )
        expected = [*tokenizer(answer, add_special_tokens=False)["input_ids"], EOS]
        assert said[0, ids.shape[1] :].tolist() == expected
