"""A run that was interrupted anywhere ends like one that was not."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from dsg.errors import UserError
from dsg.io import newest_checkpoint
from dsg.io.results import read_results
from lightning_modules import RelearningModule
from lightning_modules.parts.training import plain_values, restore_rng, rng_states
from tests.lightning_modules.interrupting import Noisy
from tests.lightning_modules.toy import ToyData, guard_settings, make_trainer

ROOT = Path(__file__).parents[3]
EPOCHS, STEPS_PER_EPOCH = 3, 3


def module_of(toy, **changes) -> RelearningModule:
    settings = {"mode": "test_time", "adapter": "lora", "lr": 1e-2, "lora_rank": 2}
    return RelearningModule(
        str(toy / "model"),
        guard=guard_settings(toy),
        attacker=Noisy(),
        **{**settings, **changes},
    )


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """Run directory of an uninterrupted run with a checkpoint after each step and each epoch."""
    run_dir = tmp_path_factory.mktemp("whole")
    checkpoints = [
        ModelCheckpoint(run_dir / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1),
        ModelCheckpoint(run_dir / "checkpoints", "after-{step}", save_top_k=-1),
    ]
    torch.manual_seed(0)
    trainer = make_trainer(
        run_dir, max_epochs=EPOCHS, enable_checkpointing=True, callbacks=checkpoints
    )
    trainer.fit(module_of(toy), ToyData())
    return run_dir


def resume(toy, run_dir, whole, name, data=None, **changes):
    torch.manual_seed(99)
    checkpoint = whole / "checkpoints" / f"{name}.ckpt"
    make_trainer(run_dir, max_epochs=EPOCHS).fit(
        module_of(toy, **changes), data or ToyData(), ckpt_path=checkpoint
    )


# The last step of an epoch is followed by an evaluation, which the checkpoint does not hold yet.
@pytest.mark.parametrize(
    "name", [*(f"step={step}" for step in (1, 3, 4, 5, 6, 8, 9)), "after-step=3", "after-step=6"]
)
def test_a_run_resumes_from_any_step(toy, tmp_path, whole, name):
    resume(toy, tmp_path, whole, name)
    expected = (whole / "results.jsonl").read_bytes()
    assert (tmp_path / "results.jsonl").read_bytes() == expected


def test_a_resumed_run_sees_no_batch_twice(toy, tmp_path, whole):
    module, seen = module_of(toy), []
    step = module.training_step

    def watched(batch, batch_idx):
        seen.append((batch_idx, batch.input_ids[0].tolist()))
        return step(batch, batch_idx)

    module.training_step = watched
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, ToyData(), ckpt_path=whole / "checkpoints" / "step=2.ckpt")
    data = ToyData()
    data.setup("fit")
    batches = [batch.input_ids[0].tolist() for batch in data.train_dataloader()]
    assert len(batches) == STEPS_PER_EPOCH
    assert seen == [(2, batches[2]), *enumerate(batches)]


def test_max_steps_within_an_epoch_leaves_a_measured_model(toy, tmp_path, whole):
    torch.manual_seed(0)
    make_trainer(tmp_path / "cut", max_epochs=EPOCHS, max_steps=4).fit(module_of(toy), ToyData())
    rows = read_results(tmp_path / "cut")
    assert {row["epoch"] for row in rows} == {0, 1, 1.3333}
    checkpoint = whole / "checkpoints" / "step=4.ckpt"
    make_trainer(tmp_path).validate(module_of(toy), ToyData(), ckpt_path=checkpoint, verbose=False)
    assert [row for row in rows if row["epoch"] == 1.3333] == read_results(tmp_path)
    # As after a kill between the last step and its evaluation.
    make_trainer(tmp_path / "again", max_epochs=EPOCHS, max_steps=4).fit(
        module_of(toy), ToyData(), ckpt_path=checkpoint
    )
    assert read_results(tmp_path / "again") == rows


def test_max_steps_at_an_epochs_end_measures_once(toy, tmp_path, whole):
    torch.manual_seed(0)
    make_trainer(tmp_path, max_epochs=EPOCHS, max_steps=6).fit(module_of(toy), ToyData())
    assert read_results(tmp_path) == [row for row in read_results(whole) if row["epoch"] < 3]


def test_skipped_epochs_but_never_the_last(toy, tmp_path, whole):
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path, max_epochs=EPOCHS, check_val_every_n_epoch=2)
    trainer.fit(module_of(toy), ToyData())
    assert read_results(tmp_path) == [row for row in read_results(whole) if row["epoch"] != 1]


def test_training_goes_on_as_if_nothing_had_been_measured(toy, tmp_path):
    torch.manual_seed(0)
    module = module_of(toy)
    make_trainer(tmp_path, max_epochs=EPOCHS, max_steps=4).fit(module, ToyData())
    before = {name: part.training for name, part in module.named_modules()}
    fresh = module_of(toy)
    make_trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(fresh, ToyData())
    assert {name: part.training for name, part in fresh.named_modules()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_check_interval": 0.5}, "`val_check_interval` must be 1.0, .* got 0.5"),
        ({"val_check_interval": 2}, "`val_check_interval` must be 1.0, .* got 2"),
        (
            {"val_check_interval": 2, "check_val_every_n_epoch": None},
            "got 2 with check_val_every_n_epoch None",
        ),
        ({"limit_val_batches": 0.5}, "`limit_val_batches` must be 1.0"),
        ({"limit_val_batches": 1}, "`limit_val_batches` must be 1.0"),
        ({"num_sanity_val_steps": 2}, "`num_sanity_val_steps` must be -1"),
    ],
)
def test_other_evaluations_are_refused_before_the_model_is_loaded(toy, tmp_path, options, message):
    module = module_of(toy)
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path, **options).fit(module, ToyData())
    assert module.model is None


def test_an_evaluation_of_a_checkpoint_repeats_that_of_the_run(toy, tmp_path, whole):
    checkpoint = whole / "checkpoints" / "after-step=6.ckpt"
    make_trainer(tmp_path).validate(module_of(toy), ToyData(), ckpt_path=checkpoint, verbose=False)
    expected = [row for row in read_results(whole) if row["epoch"] == 2]
    assert read_results(tmp_path) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 2e-2}, "`lr` was 0.01 there and is 0.02 here"),
        ({"adapter": "full"}, "`adapter` was 'lora' there and is 'full' here"),
        ({"mode": "train_time"}, "`mode` was 'test_time' there"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(toy, tmp_path, whole, changes, message):
    with pytest.raises(UserError, match=f"the checkpoint must be of this run, but {message}"):
        resume(toy, tmp_path, whole, "step=4", **changes)
    assert not (tmp_path / "results.jsonl").exists()


def test_a_checkpoint_of_other_data_is_refused(toy, tmp_path, whole):
    class MoreData(ToyData):
        def _batches(self, found):
            return super()._batches([*found, *found])

    with pytest.raises(UserError, match="a run with 5 training batches, got 3"):
        resume(toy, tmp_path, whole, "step=4", data=MoreData())


def test_a_checkpoint_of_another_kind_of_run_is_refused(toy, tmp_path, whole):
    content = torch.load(whole / "checkpoints" / "step=4.ckpt", weights_only=True)
    for name, message in (("settings", "says nothing of its settings"), ("state_dict", "weights")):
        changed = {**content, name: {}} if name == "state_dict" else dict(content)
        if name == "settings":
            del changed[name]
        path = tmp_path / f"{name}.ckpt"
        torch.save(changed, path)
        with pytest.raises(UserError, match=message):
            make_trainer(tmp_path).fit(module_of(toy), ToyData(), ckpt_path=path)


def test_all_generators_are_restored():
    states = rng_states()
    drawn = [random.random(), np.random.rand(), torch.rand(()).item()]
    restore_rng(states)
    assert [random.random(), np.random.rand(), torch.rand(()).item()] == drawn


def dsg(run_dir: Path, config: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "dsg", "fit", "-c", str(config), "--run_dir", str(run_dir)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *options], cwd=ROOT, text=True, **streams)


def check(process: subprocess.Popen, status: int = 0) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == status, errors[-2000:]


def test_six_epochs_are_three_a_kill_and_three_more(toy, tmp_path):
    names = "tests.lightning_modules"
    config = {
        "seed_everything": 0,
        "trainer": {
            "max_epochs": 6,
            "num_sanity_val_steps": -1,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"every_n_train_steps": 2},
                }
            ],
        },
        "model": {
            "class_path": "lightning_modules.RelearningModule",
            "init_args": {
                "model_name": str(toy / "model"),
                "adapter": "lora",
                "lr": 1e-2,
                "lora_rank": 2,
                "mode": "test_time",
                "attacker": {"class_path": f"{names}.interrupting.Noisy"},
                "guard": {
                    "sae": str(toy / "sae"),
                    "hook_point": guard_settings(toy).hook_point,
                    "num_features": 1,
                    "ratio_percentile": 50.0,
                    "clamp_value": -30.0,
                },
            },
        },
        "data": {"class_path": f"{names}.toy.ToyData"},
    }
    plain, killing = tmp_path / "plain.yaml", tmp_path / "killing.yaml"
    plain.write_text(yaml.safe_dump(config))
    # Step 10 is the second batch of the fourth epoch.
    kill = {"class_path": f"{names}.interrupting.Kill", "init_args": {"step": 10}}
    config["trainer"]["callbacks"].append(kill)
    killing.write_text(yaml.safe_dump(config))

    whole = dsg(tmp_path / "whole", plain)
    check(dsg(tmp_path / "killed", killing), status=-signal.SIGKILL)
    assert {row["epoch"] for row in read_results(tmp_path / "killed")} == {0, 1, 2, 3}
    checkpoint = torch.load(newest_checkpoint(tmp_path / "killed"), weights_only=True)
    # The same arguments under the same names, whether `dsg` or Python gave them.
    assert checkpoint["settings"].keys() >= plain_values(dict(module_of(toy).hparams)).keys()
    assert checkpoint["settings"]["attacker"][0] == f"{names}.interrupting.Noisy"
    check(dsg(tmp_path / "killed", plain, "--resume"))
    check(whole)
    expected, resumed = (tmp_path / name / "results.jsonl" for name in ("whole", "killed"))
    assert {row["epoch"] for row in read_results(tmp_path / "whole")} == set(range(7))
    assert resumed.read_bytes() == expected.read_bytes()
