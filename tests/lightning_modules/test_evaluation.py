import json

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from dsg.errors import UserError
from dsg.evaluation.collate import passage_collate, question_collate
from dsg.evaluation.gather import score_all
from dsg.evaluation.summary import summarise
from dsg.io.results import read_results
from lightning_modules import EvaluationModule
from tests.helpers import tiny_model, tiny_tokenizer
from tests.lightning_modules.toy import ToyData, guard_settings, make_trainer


def evaluate(toy, run_dir, data=None, stage="test", **settings):
    module = EvaluationModule(str(toy / "model"), experiment="toy", seed=4, **settings)
    getattr(make_trainer(run_dir), stage)(module, data or ToyData(), verbose=False)
    return module, read_results(run_dir)


def pick(rows, **fields):
    found = [r for r in rows if all(r[key] == value for key, value in fields.items())]
    assert len(found) == 1, fields
    return found[0]


def test_rows_are_what_plain_scoring_measures(toy, tmp_path):
    module, rows = evaluate(toy, tmp_path, guard=guard_settings(toy))
    data, model, tokenizer = ToyData(), tiny_model(), tiny_tokenizer()
    questions, passages = data.questions("test"), data.passages("test")
    for state, guard in (("off", None), ("on", module.guard)):
        values = score_all(model, [question_collate(tokenizer)(questions)], guard)
        passage_values = score_all(model, [passage_collate(tokenizer)(passages)], guard)
        for expected in summarise(questions, values, passages, passage_values):
            row = pick(
                rows,
                guard=state,
                domain=expected.domain,
                metric=expected.metric,
                protocol=expected.protocol,
            )
            assert row["value"] == pytest.approx(expected.value, rel=1e-4)
            assert row["n"] == expected.n
    constant = {"experiment": "toy", "method": "dsg", "seed": 4, "model": "model"}
    constant |= {"dataset": "toy", "split": "test", "epoch": None, "mode": None}
    assert all(row[key] == value for row in rows for key, value in constant.items())


def test_the_run_tells_its_guard(toy, tmp_path):
    module, _ = evaluate(toy, tmp_path, guard=guard_settings(toy))
    facts = json.loads((tmp_path / "run.json").read_text())
    assert (facts["model"]["name"], facts["model"]["num_layers"]) == ("model", 3)
    told = facts["guard"]
    assert (told["feature_ids"], told["threshold"]) == (
        module.guard.feature_ids,
        module.guard.threshold,
    )
    assert told["calibration"]["n"] == 16
    assert len(told["sae"]["sha256"]) == 64


def test_the_guard_triggers_on_some_but_not_on_all(toy, tmp_path):
    _, rows = evaluate(toy, tmp_path, guard=guard_settings(toy))
    rates = [row["value"] for row in rows if row["metric"] == "trigger_rate"]
    assert min(rates) < max(rates)
    assert all(row["guard"] == "on" for row in rows if row["metric"] == "trigger_rate")


def test_without_a_guard(toy, tmp_path):
    module, rows = evaluate(toy, tmp_path)
    assert module.guard is None
    assert {(row["guard"], row["method"]) for row in rows} == {("none", "base")}
    assert pick(rows, metric="alignment")["value"] == 0.0


def test_validation_takes_the_validation_split(toy, tmp_path):
    _, rows = evaluate(toy, tmp_path, stage="validate")
    assert {row["split"] for row in rows} == {"validation"}


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_does_not_change_a_decision(toy, tmp_path, batch_size):
    expected, actual = (
        evaluate(toy, tmp_path / name, ToyData(batch_size=size), guard=guard_settings(toy))[1]
        for name, size in (("four", 4), ("other", batch_size))
    )
    for first, second in zip(expected, actual, strict=True):
        assert {**first, "value": 0, "low": 0, "high": 0} == {
            **second,
            "value": 0,
            "low": 0,
            "high": 0,
        }
        assert first["value"] == pytest.approx(second["value"], rel=1e-5)


def test_results_are_the_same_bytes_every_time(toy, tmp_path):
    contents = set()
    for run in range(2):
        evaluate(toy, tmp_path / str(run), guard=guard_settings(toy))
        contents.add((tmp_path / str(run) / "results.jsonl").read_bytes())
    assert len(contents) == 1


def test_a_changed_model_is_compared_with_its_base(toy, tmp_path):
    changed = tiny_model(seed=9)
    changed.save_pretrained(tmp_path / "changed")
    module = EvaluationModule(
        str(tmp_path / "changed"), base_model_name=str(toy / "model"), method="rmu"
    )
    make_trainer(tmp_path).test(module, ToyData(), verbose=False)
    questions = ToyData().questions("test")
    batches = [question_collate(tiny_tokenizer())(questions)]
    baseline = score_all(tiny_model(), batches)
    values = score_all(changed, batches)
    expected = summarise(questions, values, [], {}, baseline)
    alignment = next(m.value for m in expected if m.metric == "alignment")
    row = pick(read_results(tmp_path), metric="alignment")
    assert row["value"] == pytest.approx(alignment, rel=1e-5)


def test_keys_that_loggers_see(toy, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    module = EvaluationModule(str(toy / "model"), guard=guard_settings(toy))
    make_trainer(tmp_path, logger=logger).test(module, ToyData(), verbose=False)
    header, values = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    logged = dict(zip(header.split(","), values.split(","), strict=True))
    row = pick(
        read_results(tmp_path), guard="on", metric="accuracy", domain="forget", protocol="cloze"
    )
    assert float(logged["test/forget/guard_on/accuracy"]) == pytest.approx(row["value"], rel=1e-5)
    assert {
        "test/retain/guard_off/perplexity",
        "test/retain/guard_on/accuracy_statement",
        "test/near/guard_on/trigger_rate",
        "test/forget/guard_on/density_auroc_passages",
    } <= logged.keys()


def test_constructor_loads_nothing():
    module = EvaluationModule("no/such/folder")
    assert not list(module.parameters())


def test_a_model_that_does_not_exist(tmp_path):
    module = EvaluationModule(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="`model_name` must be a Hugging Face folder or hub name"):
        make_trainer(tmp_path).test(module, ToyData(), verbose=False)


def test_data_without_what_the_run_needs(toy, tmp_path):
    class Poor(lightning.LightningDataModule):
        name = "poor"

        def test_dataloader(self) -> DataLoader:
            return DataLoader([0])

    with pytest.raises(
        UserError, match="`data` must offer tokenizer, val_split, questions, passages for"
    ):
        evaluate(toy, tmp_path, Poor())


def test_guard_stays_unlogged_and_model_frozen(toy, tmp_path):
    module, _ = evaluate(toy, tmp_path, guard=guard_settings(toy))
    assert not any(weight.requires_grad for weight in module.parameters())
    assert torch.equal(module.model.lm_head.weight, tiny_model().lm_head.weight)
    assert json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])["split"] == "test"
