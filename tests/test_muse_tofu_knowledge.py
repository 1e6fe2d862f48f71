"""The benchmarks tell a model that was taught the forget text from one that was not."""

import pytest

from datamodules.muse import MuseData
from datamodules.tofu.data import TofuData
from dsg.io.results import read_results
from lightning_modules import EvaluationModule
from lightning_modules.finetuning import FinetuningModule
from tests.benchmark_folders import write_muse, write_tofu
from tests.lightning_modules.toy import make_trainer, save_toy


@pytest.fixture
def measured(tmp_path):
    """Teach both models of a benchmark and measure them; the second by the first."""

    def measure(kind, write, reference):
        save_toy(tmp_path)
        dataset, start = str(write(tmp_path / "data", 4)), str(tmp_path / "model")
        found, known = {}, "self"
        for name in ("retrained", "target"):
            taught, run_dir = tmp_path / name, tmp_path / f"{name}_measured"
            options = {"finetune_on": name, "max_length": 64, "train_batch_size": 8}
            data = kind(start, dataset=dataset, **options)
            trainer = make_trainer(taught, max_epochs=60, gradient_clip_val=1.0)
            trainer.fit(FinetuningModule(start, lr=1e-2), data)
            model = str(taught / "model")
            data = kind(model, dataset=dataset, **{reference: known})
            make_trainer(run_dir).test(EvaluationModule(model), data, verbose=False)
            rows = read_results(run_dir)
            found[name] = {(row["domain"], row["metric"]): row["value"] for row in rows}
            known = str(run_dir)
        return found["retrained"], found["target"]

    return measure


def test_privleak_shows_membership(measured):
    retrained, target = measured(MuseData, write_muse, "retrained")
    # Every forget text is likelier than every holdout text, to the model that read them only.
    assert target["forget", "min_k_auc"] == 0.0
    assert target["forget", "privleak"] == -100.0
    assert 0.2 < retrained["forget", "min_k_auc"] < 0.8


def test_forget_set_is_known_to_the_target_alone(measured):
    retrained, target = measured(TofuData, write_tofu, "retained")
    for metric in ("probability", "rouge_l_recall"):
        assert target["forget", metric] > 0.95
        assert retrained["forget", metric] < 0.5
        assert retrained["retain", metric] > 0.95
