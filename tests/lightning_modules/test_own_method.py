"""A new unlearning method is one file and a few lines of YAML, as the README says."""

import pytest
import torch
import yaml

from dsg.cli.main import main
from dsg.io.results import read_results, read_run_facts
from dsg.lm.pretrained import load_model
from tests.helpers import BOS, tiny_model

METHOD = '''
from torch import nn

from dsg.objectives import Loss, Objective
from dsg.lm.likelihood import mean_nll, next_token_logits, target_mask
from dsg.lm.tokens import TokenBatch


class Uniform(Objective):
    """On forget text every next token becomes equally likely; retain text stays likely."""

    name = "uniform"

    def __init__(self, *, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def __call__(
        self, model: nn.Module, forget: TokenBatch, retain: TokenBatch, *, reference=None, step=None
    ) -> Loss:
        log_probs = next_token_logits(model, forget)[:, :-1].log_softmax(dim=-1)
        surprise = -log_probs.mean(dim=-1)[target_mask(forget)].mean()
        kept = mean_nll(next_token_logits(model, retain), retain)
        return Loss(surprise + self.alpha * kept, surprise, kept)
'''


@pytest.fixture
def fit(toy, tmp_path, monkeypatch):
    """Run `dsg fit` with model settings given; returns the exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_method.py").write_text(METHOD)

    def run(**model):
        config = {
            "model": {
                "class_path": "lightning_modules.UnlearningModule",
                "init_args": {"model_name": str(toy / "model"), "lr": 1e-2, **model},
            },
            "data": {
                "class_path": "tests.lightning_modules.toy.ToyData",
                "init_args": {"kind": "unlearning"},
            },
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": 2,
                "num_sanity_val_steps": -1,
                "enable_progress_bar": False,
                "logger": False,
            },
        }
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
        return main(["fit", "-c", "mine.yaml"])

    return run


def test_a_method_of_one_file_is_run_measured_and_saved(fit, tmp_path):
    method = {"class_path": "my_method.Uniform", "init_args": {"alpha": 0.5}}
    assert fit(objective=method) == 0
    rows = read_results(tmp_path / "runs/mine")
    assert {(row["method"], row["epoch"]) for row in rows} == {("uniform", e) for e in (0, 1, 2)}
    facts = read_run_facts(tmp_path / "runs/mine")
    assert facts["unlearn_seconds"] > 0
    assert facts["config"]["model"]["init_args"]["objective"]["init_args"] == {"alpha": 0.5}
    ids = torch.tensor([[BOS, 5, 6, 7, 8]])
    with torch.no_grad():
        before, after = (
            model(ids).logits.softmax(-1).max().item()
            for model in (tiny_model(), load_model(str(tmp_path / "runs/mine/model")))
        )
    assert after < before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": {"class_path": "dsg.objectives.NPO"}}, "`reference` must be 'frozen_copy'"),
        ({"objective": {"class_path": "my_method.Uniform"}, "lr": 0.0}, "`lr` must be positive"),
        (
            {"objective": {"class_path": "dsg.objectives.NPO", "init_args": {"beta": -1.0}}},
            "`beta` must be positive",
        ),
        (
            {
                "objective": {"class_path": "dsg.objectives.NPO"},
                "adapter": "lora",
                "reference": "adapter_off",
                "lora_targets": ["fc9"],
            },
            "`targets` must name linear layers",
        ),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(fit, tmp_path, capsys, settings, message):
    assert fit(**settings) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()
