import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from dsg.errors import UserError
from dsg.results import read_results
from lightning_modules import RelearningModule
from tests.helpers import tiny_model
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
            logged[int(fields["step"])] = fields
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
