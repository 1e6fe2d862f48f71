import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from dsg.errors import UserError
from dsg.guard.guard import Guard
from dsg.io.results import read_results
from dsg.objectives import NPO, RMU, SSD, TaskVector
from lightning_modules import EvaluationModule, SequentialModule
from tests.helpers import HOOK_POINT, tiny_model
from tests.lightning_modules.toy import ToyData, guard_settings, make_trainer, texts


def descent():
    return {"objective": RMU(HOOK_POINT, steering=5.0), "lr": 1e-2}


def run(toy, run_dir, trainer=None, data=None, ckpt_path=None, **settings):
    settings = settings or {"guard": guard_settings(toy)}
    module = SequentialModule(str(toy / "model"), **settings)
    changes = {"reload_dataloaders_every_n_epochs": 1, **(trainer or {})}
    make_trainer(run_dir, **changes).fit(module, data or ToyData("requests"), ckpt_path=ckpt_path)
    return module, read_results(run_dir)


def test_each_epoch_appends_the_guard_that_an_evaluation_makes_of_its_request(toy, tmp_path):
    """Whatever text trains a rival in the same batches: the guard's own texts decide."""
    module, _ = run(toy, tmp_path)
    for request, guard in enumerate(module.guards.guards):

        class OneRequest(ToyData):
            def forget_texts(self, request=request):
                return texts(24, 30 + request, 5 * request, 5 * request + 8)

        alone = EvaluationModule(str(toy / "model"), guard=guard_settings(toy))
        make_trainer(tmp_path / f"alone_{request}").test(alone, OneRequest(), verbose=False)
        assert guard.feature_ids == alone.guard.feature_ids
        assert guard.threshold == alone.guard.threshold
        assert guard.facts == alone.guard.facts
        saved = Guard.load(tmp_path / "guards" / f"request_{request + 1}")
        assert (saved.feature_ids, saved.threshold) == (guard.feature_ids, guard.threshold)
    assert len(module.guards) == 2


def test_no_weight_changes(toy, tmp_path):
    module, _ = run(toy, tmp_path)
    original = dict(tiny_model().named_parameters())
    for name, weight in module.model.named_parameters():
        assert torch.equal(weight, original[name])


def test_every_request_is_measured_again_after_each(toy, tmp_path):
    _, rows = run(toy, tmp_path)
    found = {(row["request"], row["guard"]): set() for row in rows if row["metric"] == "accuracy"}
    for row in rows:
        if row["metric"] == "accuracy":
            assert row["epoch"] == row["request"]
            found[row["request"], row["guard"]].add(row["domain"])
    domains = {"first", "second", "near", "retain"}
    assert found == {
        (0, "none"): domains,
        (1, "off"): domains | {"forget"},
        (1, "on"): domains | {"forget"},
        (2, "off"): domains | {"forget"},
        (2, "on"): domains | {"forget"},
    }
    counts = {
        row["request"]: row["n"]
        for row in rows
        if (row["domain"], row["metric"], row["protocol"]) == ("forget", "accuracy", "cloze")
    }
    assert counts == {1: 3, 2: 6}


def test_rmu_shares_the_module_and_keeps_its_first_reference(toy, tmp_path):
    module, rows = run(toy, tmp_path, **descent())
    assert module.automatic_optimization
    assert {(row["request"], row["guard"], row["method"]) for row in rows} == {
        (request, "none", "rmu") for request in (0, 1, 2)
    }
    original = tiny_model().get_decoder()
    assert set(module.objective.original) == {
        f"layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)
    }
    for name, kept in module.objective.original.items():
        assert torch.equal(kept, original.get_parameter(name))
        assert not torch.equal(module.model.get_decoder().get_parameter(name), kept)


def test_a_reference_stays_the_original_model(toy, tmp_path):
    changes = {"objective": NPO(retain="kl"), "reference": "frozen_copy", "lr": 1e-2}
    module, rows = run(toy, tmp_path, **changes)
    assert {row["method"] for row in rows} == {"npo"}
    weights = dict(module.reference._model.named_parameters())
    for name, weight in tiny_model().named_parameters():
        assert torch.equal(weights[name], weight)
        assert not torch.equal(module.model.get_parameter(name), weight)


@pytest.mark.parametrize(
    ("method", "every"),
    [
        ("guard", {"every_n_epochs": 1}),
        ("rmu", {"every_n_epochs": 1}),
        # The last batch of a request, whose evaluation the checkpoint does not hold yet.
        ("rmu", {"every_n_train_steps": 3}),
    ],
)
def test_a_run_resumes_after_a_request(toy, tmp_path, method, every):
    def settings():
        return descent() if method == "rmu" else {"guard": guard_settings(toy)}

    _, expected = run(toy, tmp_path / "whole", **settings())

    class Interrupted(ToyData):
        def train_dataloader(self):
            if self.trainer.current_epoch == 1:
                raise InterruptedError
            return super().train_dataloader()

    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", save_last=True, **every)
    changes = {"enable_checkpointing": True, "callbacks": [checkpoints]}
    with pytest.raises(InterruptedError):
        run(toy, tmp_path / "halves", changes, Interrupted("requests"), **settings())
    [path] = (tmp_path / "checkpoints").glob("request_*.ckpt" if method == "guard" else "last.ckpt")
    names = torch.load(path, weights_only=True)["state_dict"]
    assert all("down_proj" in name for name in names)
    assert bool(names) == (method == "rmu")
    assert run(toy, tmp_path / "halves", ckpt_path=path, **settings())[1] == expected


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"reload_dataloaders_every_n_epochs": 0}, "`reload_dataloaders_every_n_epochs` must be 1"),
        ({"max_epochs": 5}, "`max_epochs` must be the number of requests, 2, got 5"),
        ({"num_sanity_val_steps": 0}, "`num_sanity_val_steps` must be -1"),
    ],
)
def test_trainers_that_cannot_run_a_curriculum(toy, tmp_path, trainer, message):
    with pytest.raises(UserError, match=message):
        run(toy, tmp_path, trainer)


def test_exactly_one_way_to_fulfil_requests(toy):
    with pytest.raises(UserError, match=r"exactly one of `guard` and `objective` .* got neither"):
        SequentialModule("model")
    with pytest.raises(UserError, match=r"exactly one of `guard` and `objective` .* got both"):
        SequentialModule("model", guard=guard_settings(toy), **descent())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": NPO()}, "`reference` must be 'frozen_copy' for NPO"),
        ({"objective": SSD()}, "`objective` must be a loss to descend on .* got SSD"),
        ({"objective": TaskVector()}, "`objective` must be a loss to descend on .* got TaskVector"),
        ({**descent(), "lr": 0.0}, "`lr` must be positive and finite, got 0.0"),
    ],
)
def test_objectives_that_cannot_follow_each_other(settings, message):
    with pytest.raises(UserError, match=message):
        SequentialModule("model", **settings)
