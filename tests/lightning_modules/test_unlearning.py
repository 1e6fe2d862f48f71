import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsg.errors import UserError
from dsg.io.results import read_results, read_run_facts
from dsg.lm.likelihood import mean_nll, next_token_logits
from dsg.lm.pretrained import load_model, load_plain_model
from dsg.objectives import (
    NPO,
    RMU,
    SCRUB,
    SSD,
    GradDiff,
    GradientAscent,
    SimNPO,
    TaskVector,
)
from lightning_modules import EvaluationModule, RelearningModule, UnlearningModule
from tests.helpers import HOOK_POINT, tiny_model
from tests.lightning_modules.toy import ToyData, make_trainer

COPY = {"reference": "frozen_copy"}
# Objective, further settings. Every method is a new object, because it may keep weights.
METHODS = {
    "ga": lambda: (GradientAscent(), {}),
    "grad_diff": lambda: (GradDiff(), {}),
    "grad_diff_kl": lambda: (GradDiff(retain="kl"), COPY),
    "npo": lambda: (NPO(), COPY),
    # The paper's beta leaves no slope on texts that a random model finds improbable.
    "simnpo": lambda: (SimNPO(beta=0.5, gamma=1.0), {}),
    "rmu": lambda: (RMU(HOOK_POINT, steering=5.0, num_layers=1, target="mlp."), {"lr": 1e-2}),
    "scrub": lambda: (SCRUB(alpha=0.1, gamma=0.5, beta=2.0), COPY),
    "ssd": lambda: (SSD(selection_threshold=1.2, dampening=0.3), {"epochs": 1}),
    "task_vector": lambda: (TaskVector(scale=3.0), {}),
}
LORA = {"adapter": "lora", "lora_rank": 2, "lr": 1e-2}


def make(toy, method="npo", **changes):
    objective, settings = METHODS[method]()
    settings = {"lr": 1e-3, **settings, **changes}
    settings.pop("epochs", None)
    return UnlearningModule(str(toy / "model"), objective, **settings)


def unlearn(toy, run_dir, method="npo", trainer=None, ckpt_path=None, **changes):
    epochs = METHODS[method]()[1].get("epochs", 2)
    torch.manual_seed(0)
    module = make(toy, method, **changes)
    trainer = make_trainer(run_dir, **{"max_epochs": epochs, **(trainer or {})})
    trainer.fit(module, ToyData("unlearning"), ckpt_path=ckpt_path, weights_only=True)
    return module


def batches():
    data = ToyData("unlearning")
    data.setup("fit")
    return list(data.train_dataloader())


@torch.no_grad()
def nll(model, text="forget"):
    found = [batch[text] for batch in batches()]
    return sum(mean_nll(next_token_logits(model, batch), batch).item() for batch in found)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_forgets_and_leaves_an_ordinary_folder(toy, tmp_path, method):
    module = unlearn(toy, tmp_path, method)
    rows = read_results(tmp_path)
    epochs = range(METHODS[method]()[1].get("epochs", 2) + 1)
    assert {(row["epoch"], row["guard"], row["method"], row["attack"]) for row in rows} == {
        (epoch, "none", module.objective.name, None) for epoch in epochs
    }
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, weight in saved.named_parameters():
        assert torch.equal(weight, module.model.get_parameter(name))
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("w1")["input_ids"] == [2, 5]
    if method == "rmu":
        batch = batches()[0]
        objective = METHODS["rmu"]()[0]
        objective.prepare(original := tiny_model())
        before, after = (
            objective(model, batch["forget"], batch["retain"]).forget.item()
            for model in (original, saved)
        )
        assert after < 0.8 * before
    elif method == "ssd":
        # Of a model that knows nothing, smaller weights may even make the text likelier.
        objective = METHODS["ssd"]()[0]
        expected = load_plain_model(str(toy / "model")).requires_grad_(True)
        objective.prepare(expected)
        for batch in batches():
            objective(expected, **two(batch))
        objective.finish(expected)
        for name, weight in expected.named_parameters():
            assert torch.equal(saved.get_parameter(name), weight)
        assert not torch.equal(expected.lm_head.weight, tiny_model().lm_head.weight)
    elif method == "scrub":
        module.objective.beta = 1.0
        batch = batches()[0]
        loss = module.objective(saved, **two(batch), reference=module.reference, step=0)
        assert loss.forget.item() < -1e-3
    else:
        assert nll(saved) > nll(tiny_model()) + 0.01


def two(batch):
    return {"forget": batch["forget"], "retain": batch["retain"]}


def test_only_the_chosen_weights_change(toy, tmp_path):
    module = unlearn(toy, tmp_path, "rmu")
    original = dict(tiny_model().named_parameters())
    moved = {
        name
        for name, weight in module.model.named_parameters()
        if not torch.equal(weight, original[name])
    }
    assert moved == {f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")}


@pytest.mark.parametrize("reference", ["frozen_copy", "adapter_off"])
def test_lora_trains_and_frozen_weights_are_bit_equal(toy, tmp_path, reference):
    settings = {**LORA, "reference": reference}
    module = unlearn(toy, tmp_path, "npo", {"max_epochs": 1, "limit_train_batches": 1}, **settings)
    assert module.trainer.global_step == 1
    original = dict(tiny_model().named_parameters())
    num_compared = 0
    for name, weight in module.model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace("base_layer.", "")
        if plain in original:
            num_compared += 1
            assert torch.equal(weight, original[plain])
        elif "lora_B" in name:
            assert weight.norm() > 0
    assert num_compared == len(original)


def test_both_references_of_an_adapter_unlearn_alike(toy, tmp_path):
    weights = []
    for reference in ("frozen_copy", "adapter_off"):
        module = unlearn(toy, tmp_path / reference, **LORA, reference=reference)
        weights.append({n: w.detach() for n, w in module.model.named_parameters() if "lora_" in n})
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def adapter(toy, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("adapter")
    return unlearn(toy, run_dir, **LORA, reference="adapter_off"), run_dir


def test_an_adapter_folder_holds_the_adapter_alone_and_loads_to_the_same_logits(adapter):
    module, run_dir = adapter
    folder = run_dir / "model"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not {"model.safetensors", "config.json"} & names
    loaded, ids = load_model(str(folder)), batches()[0]["forget"].input_ids
    with torch.no_grad():
        expected = module.model(ids).logits
        assert torch.equal(loaded(ids).logits, expected)
        assert not torch.equal(tiny_model()(ids).logits, expected)
        torch.testing.assert_close(load_plain_model(str(folder))(ids).logits, expected)
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_an_adapter_folder_is_evaluated_unmerged(adapter, tmp_path):
    _, run_dir = adapter
    module = EvaluationModule(str(run_dir / "model"))
    make_trainer(tmp_path).test(module, ToyData(), verbose=False)
    assert any("lora_B" in name for name, _ in module.model.named_parameters())
    assert read_results(tmp_path)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_adapter_is_merged_before_an_attack(adapter, tmp_path, caplog, kind):
    _, run_dir = adapter
    attack = RelearningModule(str(run_dir / "model"), adapter=kind, lr=1e-2)
    with caplog.at_level("WARNING", logger="dsg.lm.pretrained"):
        make_trainer(tmp_path, max_epochs=1).fit(attack, ToyData())
    assert "is merged into its base model in float32" in caplog.text
    adapted = {name.split(".")[-3] for name, _ in attack.named_parameters() if "lora_" in name}
    assert bool(adapted) == (kind == "lora")

    def perplexities(folder, epoch):
        rows = [row for row in read_results(folder) if row["metric"] == "perplexity"]
        return {row["domain"]: row["value"] for row in rows if row["epoch"] == epoch}

    # The attack begins where unlearning ended.
    assert perplexities(tmp_path, 0) == pytest.approx(perplexities(run_dir, 2), rel=1e-4)
    assert perplexities(tmp_path, 1) != perplexities(tmp_path, 0)


@pytest.mark.parametrize(
    ("method", "settings", "every"),
    [
        ("npo", {}, {"every_n_epochs": 1}),
        ("npo", {**LORA, "reference": "adapter_off"}, {"every_n_train_steps": 4}),
        ("task_vector", {}, {"every_n_train_steps": 4}),
        # The last batch of an epoch, whose evaluation the checkpoint does not hold yet.
        ("npo", {}, {"every_n_train_steps": 3}),
        ("task_vector", {}, {"every_n_train_steps": 3}),
    ],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(toy, tmp_path, method, settings, every):
    expected = unlearn(toy, tmp_path / "whole", method, **settings)

    class Interrupted(ModelCheckpoint):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 4:  # the second batch of the second epoch comes next
                raise InterruptedError

    checkpoints = Interrupted(tmp_path / "checkpoints", save_last=True, **every)
    changes = {"enable_checkpointing": True, "callbacks": [checkpoints]}
    with pytest.raises(InterruptedError):
        unlearn(toy, tmp_path / "halves", method, changes, **settings)
    path = tmp_path / "checkpoints" / "last.ckpt"
    names = set(torch.load(path, weights_only=True)["state_dict"])
    assert names == {n for n, weight in expected.named_parameters() if weight.requires_grad}
    resumed = unlearn(toy, tmp_path / "halves", method, ckpt_path=path, **settings)
    for name, weight in expected.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), weight)
    assert read_results(tmp_path / "halves") == read_results(tmp_path / "whole")
    with pytest.raises(UserError, match=r"the checkpoint must be of this run, but `lr` was"):
        unlearn(toy, tmp_path / "other", method, ckpt_path=path, **{**settings, "lr": 0.5})


def test_the_last_evaluation_measures_the_model_that_is_saved(toy, tmp_path):
    unlearn(toy, tmp_path / "run", "task_vector")
    rows = [row for row in read_results(tmp_path / "run") if row["epoch"] == 2]
    again = UnlearningModule(str(tmp_path / "run/model"), GradientAscent(), model_label="model")
    make_trainer(tmp_path / "again", max_epochs=0).validate(again, ToyData("unlearning"))
    values = {
        (row["domain"], row["metric"], row["protocol"]): row["value"]
        for row in read_results(tmp_path / "again")
        if row["metric"] in ("accuracy", "perplexity")
    }
    assert values
    for row in rows:
        if row["metric"] in ("accuracy", "perplexity"):
            assert values[row["domain"], row["metric"], row["protocol"]] == row["value"]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ssd_on_several_ranks_equals_one(toy, tmp_path, num_ranks):
    # Three batches: with two ranks the second has none in the last round.
    unlearn(toy, tmp_path / "one", "ssd")
    trainer = {"devices": num_ranks, "strategy": "ddp_fork"}
    unlearn(toy, tmp_path / "several", "ssd", trainer)
    for name in ("results.jsonl", "model/model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "several" / name).read_bytes()


@pytest.mark.parametrize("settings", [COPY, {**LORA, "reference": "adapter_off"}])
def test_two_ranks_descend_together(toy, tmp_path, settings):
    trainer = {"devices": 2, "strategy": "ddp_fork", "max_epochs": 1}
    unlearn(toy, tmp_path, "npo", trainer, **settings)
    assert {row["epoch"] for row in read_results(tmp_path)} == {0, 1}
    assert nll(load_model(str(tmp_path / "model"))) > nll(tiny_model()) + 0.01


def test_the_time_of_training_is_a_fact_of_the_run(toy, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"seconds": 3}))
    unlearn(toy, tmp_path, "ga")
    facts = read_run_facts(tmp_path)
    assert 0 < facts["unlearn_seconds"] < 60
    assert facts["seconds"] == 3


def test_settings_that_cannot_work(toy):
    for lr in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="`lr` must be positive and finite"):
            make(toy, lr=lr)
    for method in ("npo", "scrub", "grad_diff_kl"):
        with pytest.raises(UserError, match=r"`reference` must be 'frozen_copy' for \w+ with"):
            make(toy, method, reference="none")
    with pytest.raises(UserError, match=r"`reference` must be 'frozen_copy' or 'adapter_off' for"):
        make(toy, **LORA, reference="none")
    with pytest.raises(UserError, match=r"`reference` 'adapter_off' needs adapter 'lora'"):
        make(toy, reference="adapter_off")
    with pytest.raises(UserError, match=r"`adapter` must be 'full' for SSD, got 'lora'"):
        make(toy, "ssd", adapter="lora")
    with pytest.raises(UserError, match=r"`reference` must be one of"):
        make(toy, reference="copy")


@pytest.mark.parametrize(
    ("method", "settings", "trainer", "message"),
    [
        ("npo", {**LORA, "lora_targets": ["fc9"]}, {}, r"must name linear layers.*fc9"),
        ("rmu", {"adapter": "lora", "lora_targets": ["q_proj"]}, {}, r"`target` must match"),
        ("ssd", {}, {"max_epochs": 3}, r"`max_epochs` must be 1 for SSD.*got 3"),
        ("npo", {}, {"num_sanity_val_steps": 2}, r"`num_sanity_val_steps` must be -1"),
    ],
)
def test_runs_that_cannot_begin(toy, tmp_path, method, settings, trainer, message):
    with pytest.raises(UserError, match=message):
        unlearn(toy, tmp_path, method, trainer, **settings)
    assert not (tmp_path / "results.jsonl").exists()


def test_adapters_that_cannot_be_read(adapter, tmp_path):
    _, run_dir = adapter
    config = (run_dir / "model/adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"an adapter without adapter_model.safetensors"):
        load_model(str(tmp_path))
    weights = (run_dir / "model/adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    changed = {**json.loads(config), "base_model_name_or_path": "/nowhere"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"`model_name` must be a Hugging Face folder"):
        load_model(str(tmp_path))
