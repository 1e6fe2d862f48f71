"""Every kind of run ends with one sentence when its model has diverged."""

import pytest
import torch

from dsg.errors import UserError
from dsg.objectives import RMU, SSD, GradientAscent
from lightning_modules import (
    EvaluationModule,
    FinetuningModule,
    RelearningModule,
    SelectionModule,
    SequentialModule,
    UnlearningModule,
)
from tests.helpers import HOOK_POINT, tiny_model, tiny_tokenizer
from tests.lightning_modules.odd_texts import OddTexts
from tests.lightning_modules.toy import ToyData, guard_settings, make_trainer


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Folders of models with a nan in the last weights, or in those of the first layer."""
    found = {}
    for place, name in (("head", "lm_head.weight"), ("first", "model.layers.0.mlp.up_proj.weight")):
        model = tiny_model()
        with torch.no_grad():
            model.get_parameter(name)[0, 0] = torch.nan
        found[place] = str(tmp_path_factory.mktemp(place))
        model.save_pretrained(found[place])
        tiny_tokenizer().save_pretrained(found[place])
    return found


@pytest.mark.parametrize("place", ["head", "first"])
@pytest.mark.parametrize("guarded", [False, True])
def test_evaluation(toy, broken, tmp_path, place, guarded):
    module = EvaluationModule(broken[place], guard=guard_settings(toy) if guarded else None)
    with pytest.raises(UserError, match="must be finite, got nan or inf"):
        make_trainer(tmp_path).test(module, ToyData())
    assert not (tmp_path / "results.jsonl").exists()


def test_selection(toy, broken, tmp_path):
    module = SelectionModule(broken["first"], guard_settings(toy))
    with pytest.raises(UserError, match="must be finite, got nan or inf"):
        make_trainer(tmp_path).validate(module, OddTexts())


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("attack", lambda toy, lr: FinetuningModule(str(toy / "model"), lr=lr)),
        ("attack", lambda toy, lr: RelearningModule(str(toy / "model"), lr=lr)),
        (
            "attack",
            lambda toy, lr: RelearningModule(
                str(toy / "model"), guard_settings(toy), "test_time", lr=lr, adapter="lora"
            ),
        ),
        (
            "attack",
            lambda toy, lr: RelearningModule(
                str(toy / "model"), guard_settings(toy), "train_time", lr=lr
            ),
        ),
        (
            "unlearning",
            lambda toy, lr: UnlearningModule(str(toy / "model"), GradientAscent(), lr=lr),
        ),
        (
            "unlearning",
            lambda toy, lr: UnlearningModule(
                str(toy / "model"), GradientAscent(), adapter="lora", lr=lr
            ),
        ),
        (
            "unlearning",
            lambda toy, lr: UnlearningModule(
                str(toy / "model"), RMU(HOOK_POINT, num_layers=1, target="mlp."), lr=lr
            ),
        ),
        (
            "requests",
            lambda toy, lr: SequentialModule(str(toy / "model"), objective=GradientAscent(), lr=lr),
        ),
    ],
)
def test_training(toy, tmp_path, kind, make):
    reload = {"reload_dataloaders_every_n_epochs": 1} if kind == "requests" else {}
    with pytest.raises(UserError, match=r"must be finite, got (nan|-?inf)"):
        make_trainer(tmp_path, **reload).fit(make(toy, 1e30), ToyData(kind))
    assert not (tmp_path / "model").exists()


def test_a_last_step_that_diverges_leaves_no_model(toy, tmp_path):
    """No loss and no evaluation follows it."""

    class Last(FinetuningModule):
        def on_train_end(self) -> None:
            with torch.no_grad():
                next(self.parameters()).fill_(torch.nan)

    trainer = make_trainer(tmp_path, max_epochs=1)
    with pytest.raises(UserError, match=r"the trained weights must be finite.* in .*embed_tokens"):
        trainer.fit(Last(str(toy / "model")), ToyData())
    assert not (tmp_path / "model").exists()


def test_ssd_measures_no_nan(broken, tmp_path):
    module = UnlearningModule(broken["head"], SSD())
    with pytest.raises(UserError, match="must be finite, got nan"):
        make_trainer(tmp_path, max_epochs=1, num_sanity_val_steps=-1).fit(
            module, ToyData("unlearning")
        )
