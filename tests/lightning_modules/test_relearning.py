from typing import ClassVar

import jsonargparse
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from dsg.attacks import Attacker, AttackLoss, Evade, Task
from dsg.errors import UserError
from dsg.guard import GuardSettings
from dsg.io.results import read_results
from lightning_modules import EvaluationModule, RelearningModule
from tests.helpers import HOOK_POINT, tiny_model, tiny_tokenizer
from tests.lightning_modules.toy import ToyData, guard_settings, make_trainer

# Too small to change a float32 weight.
NO_LR = 1e-30


def attack(toy, run_dir, mode="test_time", data=None, **changes):
    trainer_changes = changes.pop("trainer", {})
    guard = None if mode == "none" else guard_settings(toy)
    settings = {"lr": 1e-2, "lora_rank": 2, **changes}
    module = RelearningModule(str(toy / "model"), guard=guard, mode=mode, **settings)
    torch.manual_seed(0)
    make_trainer(run_dir, **trainer_changes).fit(module, data or ToyData())
    return module, read_results(run_dir)


def accuracies(rows, **fields):
    return {
        (row["epoch"], row["domain"], row["guard"]): row["value"]
        for row in rows
        if row["metric"] == "perplexity" and all(row[k] == v for k, v in fields.items())
    }


def test_every_epoch_is_measured_with_the_guard_off_and_on(toy, tmp_path):
    _, rows = attack(toy, tmp_path)
    assert {(row["epoch"], row["guard"]) for row in rows} == {
        (epoch, guard) for epoch in (0, 1, 2) for guard in ("off", "on")
    }
    assert {(row["mode"], row["attack"]) for row in rows} == {("test_time", "relearn_full")}
    domains = {row["domain"] for row in rows}
    assert {"forget", "forget_shown", "forget_unshown", "near", "retain"} <= domains


def test_epoch_zero_is_the_model_before_the_attack(toy, tmp_path):
    values = {}
    for lr in (NO_LR, 1e-2):
        _, rows = attack(toy, tmp_path / str(lr), lr=lr)
        values[lr] = accuracies(rows)
    untouched, attacked = values[NO_LR], values[1e-2]
    for (epoch, domain, guard), value in attacked.items():
        same = value == untouched[epoch, domain, guard]
        assert same == (epoch == 0), (epoch, domain, guard)
        assert untouched[epoch, domain, guard] == untouched[0, domain, guard]


def test_the_guard_is_made_from_the_raw_model_and_stays(toy, tmp_path):
    before, _ = attack(toy, tmp_path / "before", lr=NO_LR)
    after, _ = attack(toy, tmp_path / "after")
    assert before.guard.threshold == after.guard.threshold
    for name, buffer in before.guard.named_buffers():
        assert torch.equal(buffer, after.guard.get_buffer(name))


def test_a_guard_in_the_forward_pass_changes_the_training(toy, tmp_path):
    weights = {
        mode: attack(toy, tmp_path / mode, mode)[0].model.lm_head.weight
        for mode in ("none", "test_time", "train_time")
    }
    assert torch.equal(weights["none"], weights["test_time"])
    assert not torch.equal(weights["test_time"], weights["train_time"])


def test_without_a_guard(toy, tmp_path):
    _, rows = attack(toy, tmp_path, "none")
    assert {(row["guard"], row["mode"], row["method"]) for row in rows} == {("none", None, "base")}


@pytest.mark.parametrize("mode", ["test_time", "train_time"])
def test_lora_leaves_the_model_and_the_guard_alone(toy, tmp_path, mode):
    module, rows = attack(toy, tmp_path, mode, adapter="lora")
    assert {row["attack"] for row in rows} == {"relearn_lora"}
    original = dict(tiny_model().named_parameters())
    for name, weight in module.model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace("base_layer.", "")
        if plain in original:
            assert torch.equal(weight, original[plain])
        elif "lora_B" in name:
            assert weight.norm() > 0
    values = accuracies(rows, guard="off")
    assert values[2, "forget", "off"] != values[0, "forget", "off"]


def test_training_loss_is_the_cross_entropy_of_real_tokens(toy, tmp_path):
    module, _ = attack(toy, tmp_path, "none", lr=NO_LR)
    data = ToyData()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    module.log = lambda *_args, **_kwargs: None
    loss = module.training_step(batch, 0)
    losses = []
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        row = ids[: int(mask.sum())]
        log_probs = tiny_model()(row[None]).logits[0].double().log_softmax(-1)
        losses += [-log_probs[place, token].item() for place, token in enumerate(row[1:])]
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_logger_gets_what_the_rows_say(toy, tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    _, rows = attack(toy, tmp_path, trainer={"logger": logger, "log_every_n_steps": 1})
    lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    logged = {}
    for line in lines[1:]:
        fields = dict(zip(header, line.split(","), strict=True))
        if fields["val/forget/guard_on/accuracy"]:
            logged[float(fields["epoch"])] = fields
    assert sorted(logged) == [0, 1, 2]
    for row in rows:
        if row["metric"] == "accuracy" and row["protocol"] == "cloze":
            key = f"val/{row['domain']}/guard_{row['guard']}/accuracy"
            assert float(logged[row["epoch"]][key]) == pytest.approx(row["value"], rel=1e-5)


def test_a_checkpoint_holds_only_what_the_attack_changed_and_a_run_resumes(toy, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    attack(
        toy,
        tmp_path / "first",
        adapter="lora",
        trainer={
            "max_epochs": 1,
            "enable_checkpointing": True,
            "callbacks": [checkpoints],
        },
    )
    path = tmp_path / "checkpoints" / "last.ckpt"
    names = torch.load(path, weights_only=True)["state_dict"]
    assert names
    assert all("lora_" in name for name in names)

    module = RelearningModule(
        str(toy / "model"),
        guard=guard_settings(toy),
        mode="test_time",
        adapter="lora",
        lr=1e-2,
        lora_rank=2,
    )
    make_trainer(tmp_path / "resumed").fit(module, ToyData(), ckpt_path=path, weights_only=True)
    _, expected = attack(toy, tmp_path / "whole", adapter="lora")
    assert read_results(tmp_path / "resumed") == expected


def test_the_state_before_the_attack_must_be_measured(toy, tmp_path):
    with pytest.raises(UserError, match="`num_sanity_val_steps` must be -1"):
        attack(toy, tmp_path, trainer={"num_sanity_val_steps": 2})
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("mode", ["none", "train_time"])
def test_mode_and_guard_must_agree(toy, mode):
    guard = guard_settings(toy) if mode == "none" else None
    with pytest.raises(UserError, match="`mode` must be 'none' exactly if `guard` is missing"):
        RelearningModule("model", guard=guard, mode=mode)


class Shrink(Attacker):
    """An attack of one's own is one class: this one only makes the logits of a batch small."""

    name: ClassVar[str] = "shrink"

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    def __call__(self, forward, batch, guard) -> AttackLoss:
        del guard
        size = forward(batch).logits.square().mean()
        return AttackLoss(self.strength * size, {"size": size})


def test_an_attack_is_added_by_one_class(toy, tmp_path):
    module, rows = attack(toy, tmp_path, attacker=Shrink(2.0))
    assert {row["attack"] for row in rows} == {"relearn_full_shrink"}
    ids = torch.tensor([[4, 5, 6]])
    assert module.model(ids).logits.norm() < 0.9 * tiny_model()(ids).logits.norm()


def test_an_attacker_is_named_in_a_configuration():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(RelearningModule, "model")
    settings = {
        "class_path": "lightning_modules.RelearningModule",
        "init_args": {
            "model_name": "m",
            "mode": "test_time",
            "guard": {"hook_point": HOOK_POINT, "sae": "s"},
            "attacker": {"class_path": "dsg.attacks.Evade", "init_args": {"weight": 3.0}},
        },
    }
    module = parser.instantiate_classes(parser.parse_object({"model": settings})).model
    assert isinstance(module.attacker, Evade)
    assert module.attacker.weight == 3.0


def test_an_evading_attacker_lowers_the_density_of_its_text(toy, tmp_path):
    data = ToyData()
    data.setup("fit")
    density = {}
    for attacker in (Task(), Evade(weight=100.0)):
        module, _ = attack(
            toy, tmp_path / type(attacker).__name__, attacker=attacker, trainer={"max_epochs": 5}
        )
        found = [
            module.guard.density(module.model, b.input_ids, b.attention_mask, b.token_mask)
            for b in data.train_dataloader()
        ]
        density[type(attacker)] = torch.cat(found).mean()
    assert density[Task] > 0.1
    assert density[Evade] < 0.5 * density[Task]


def test_drift_is_one_before_the_attack_and_moves_with_it(toy, tmp_path):
    _, rows = attack(toy, tmp_path, lr=3e-2)
    drift = [row for row in rows if row["metric"].startswith("drift_")]
    assert {(row["domain"], row["metric"], row["guard"], row["epoch"]) for row in drift} == {
        (domain, metric, "off", epoch)
        for domain in ("forget", "retain")
        for metric in ("drift_cosine", "drift_norm_ratio")
        for epoch in (0, 1, 2)
    }
    for row in drift:
        assert (row["value"] == 1.0) == (row["epoch"] == 0)
        assert row["protocol"] == "passages"
    assert all(
        row["value"] < 1 for row in drift if row["metric"] == "drift_cosine" and row["epoch"]
    )


def test_drift_needs_a_hook_point(toy, tmp_path):
    _, rows = attack(toy, tmp_path / "without", "none")
    assert not [row for row in rows if row["metric"].startswith("drift_")]
    _, rows = attack(toy, tmp_path / "with", "none", hook_point=HOOK_POINT)
    found = {row["guard"] for row in rows if row["metric"].startswith("drift_")}
    assert found == {"none"}


def gate_of(rows, method, epoch):
    return {
        (row["domain"], row["protocol"], row["metric"]): row["value"]
        for row in rows
        if row["method"] == method and row["epoch"] == epoch and row["guard"] == "on"
    }


def test_a_maintained_guard_is_that_of_the_attacked_model(toy, tmp_path):
    module, rows = attack(toy, tmp_path, lr=3e-2, maintenance=True, trainer={"max_epochs": 1})
    assert {(row["method"], row["guard"]) for row in rows} == {
        ("dsg", "off"),
        ("dsg", "on"),
        ("dsg_maintained", "on"),
    }
    assert gate_of(rows, "dsg", 0) == gate_of(rows, "dsg_maintained", 0)
    assert gate_of(rows, "dsg", 1) != gate_of(rows, "dsg_maintained", 1)
    # The same guard, from nothing but the attacked model.
    module.model.save_pretrained(tmp_path / "attacked")
    tiny_tokenizer().save_pretrained(tmp_path / "attacked")
    evaluation = EvaluationModule(str(tmp_path / "attacked"), guard=guard_settings(toy))
    make_trainer(tmp_path / "evaluation").validate(evaluation, ToyData(), verbose=False)
    fresh = gate_of(read_results(tmp_path / "evaluation"), "dsg", None)
    maintained = gate_of(rows, "dsg_maintained", 1)
    for key in (fresh.keys() & maintained.keys()) - {("forget", "cloze", "alignment")}:
        assert fresh[key] == maintained[key]


def test_maintenance_does_not_touch_the_attack(toy, tmp_path):
    rows = {}
    for maintenance in (False, True):
        run_dir = tmp_path / str(maintenance)
        _, found = attack(toy, run_dir, adapter="lora", maintenance=maintenance)
        rows[maintenance] = [row for row in found if row["method"] == "dsg"]
    assert rows[True] == rows[False]


def test_a_saved_guard_is_maintained_with_the_settings_it_was_made_with(toy, tmp_path):
    made, _ = attack(toy, tmp_path / "made", maintenance=True, trainer={"max_epochs": 1})
    made.guard.save(tmp_path / "guard")
    made_with = guard_settings(toy)
    saved = {"hook_point": made_with.hook_point, "sae": made_with.sae, "sae_id": made_with.sae_id}
    settings = {
        "guard": GuardSettings(**saved, artifact=str(tmp_path / "guard")),
        "mode": "test_time",
        "maintenance": True,
        "lr": 1e-2,
    }
    module = RelearningModule(str(toy / "model"), **settings)
    torch.manual_seed(0)
    make_trainer(tmp_path / "loaded", max_epochs=1).fit(module, ToyData())
    assert read_results(tmp_path / "loaded") == read_results(tmp_path / "made")

    made.guard.replace(facts={}).save(tmp_path / "guard")
    module = RelearningModule(str(toy / "model"), **settings)
    with pytest.raises(UserError, match="must tell the settings it was made with"):
        make_trainer(tmp_path / "untold").fit(module, ToyData())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "`lr` must be positive and finite, got 0.0"),
        ({"lr": -1e-3}, "`lr` must be positive and finite"),
        ({"lr": float("nan")}, "`lr` must be positive and finite"),
        ({"attacker": Evade()}, "`guard` must be given for this `attacker`, got None"),
        ({"maintenance": True}, "`guard` must be given for this `maintenance`"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(UserError, match=message):
        RelearningModule("model", **settings)


def test_a_target_that_matches_no_layer_is_refused_before_anything_is_measured(toy, tmp_path):
    with pytest.raises(UserError, match=r"`targets` must name linear layers .* got \['c_attn'\]"):
        attack(toy, tmp_path, adapter="lora", lora_targets=["q_proj", "c_attn"])
    assert not (tmp_path / "results.jsonl").exists()
