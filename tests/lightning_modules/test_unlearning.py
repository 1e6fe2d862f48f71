import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsg.results import read_results
from lightning_modules import UnlearningModule
from lightning_modules.unlearning import RMUSettings
from tests.helpers import HOOK_POINT, tiny_model
from tests.lightning_modules.toy import ToyData, make_trainer


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("unlearning")
    module = UnlearningModule(
        str(toy / "model"), RMUSettings(HOOK_POINT, steering=5.0, num_layers=1, lr=1e-2)
    )
    make_trainer(run_dir).fit(module, ToyData("unlearning"))
    return module, run_dir


def test_only_the_chosen_weights_change(run):
    module, _ = run
    original = dict(tiny_model().named_parameters())
    moved = {
        name
        for name, weight in module.model.named_parameters()
        if not torch.equal(weight, original[name])
    }
    assert moved == {"model.layers.1.mlp.down_proj.weight"}


def test_every_epoch_is_measured(run):
    _, run_dir = run
    rows = read_results(run_dir)
    assert {(row["epoch"], row["guard"], row["method"]) for row in rows} == {
        (epoch, "none", "rmu") for epoch in (0, 1, 2)
    }
    assert all(row["attack"] is None for row in rows)
    alignments = [row for row in rows if row["metric"] == "alignment"]
    assert [row["epoch"] for row in alignments] == [0, 1, 2]


def test_the_changed_model_is_an_ordinary_folder(run):
    module, run_dir = run
    saved = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    for name, weight in saved.named_parameters():
        assert torch.equal(weight, module.model.get_parameter(name))
    assert AutoTokenizer.from_pretrained(run_dir / "model")("w1")["input_ids"] == [2, 5]
