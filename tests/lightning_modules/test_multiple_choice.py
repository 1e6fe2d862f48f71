"""Multiple-choice sets evaluated: any ranks and batches give the same bytes, sets and pools."""

import pytest

from datamodules.multiple_choice.data import MultipleChoiceData
from datamodules.parts.corpora import Corpus, CorpusSettings
from dsg.guard.recipes import GuardSettings
from dsg.io.results import read_results
from lightning_modules import EvaluationModule
from tests.choice_data import choice_rows, save_choice_model, write_rows
from tests.helpers import HOOK_POINT, standard_sae
from tests.lightning_modules.toy import make_trainer


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choices")
    save_choice_model(folder / "model")
    standard_sae().save_model(str(folder / "sae"))
    for seed, (name, num) in enumerate((("bio", 23), ("history", 14), ("aging", 9))):
        write_rows(folder / f"{name}.jsonl", choice_rows(num, seed, name))
    (folder / "forget.jsonl").write_text(
        "".join(f'{{"text": "w{i} w1 w{i}"}}\n' for i in range(12))
    )
    (folder / "retain.jsonl").write_text(
        "".join(f'{{"text": "w2 w{i} w{i}"}}\n' for i in range(26))
    )
    return folder


def evaluate(toy, run_dir, protocol, batch_size=4, **trainer):
    guard = GuardSettings(
        hook_point=HOOK_POINT,
        sae=str(toy / "sae"),
        num_features=2,
        ratio_percentile=50.0,
        threshold_percentile=60.0,
        clamp_value=-30.0,
    )
    corpora = CorpusSettings(
        forget=[Corpus(str(toy / "forget.jsonl"))], retain=[Corpus(str(toy / "retain.jsonl"))]
    )
    data = MultipleChoiceData(
        str(toy / "model"),
        [str(toy / "bio.jsonl")],
        [str(toy / "history.jsonl"), str(toy / "aging.jsonl")],
        protocol=protocol,
        batch_size=batch_size,
        corpora=corpora,
    )
    module = EvaluationModule(str(toy / "model"), guard=guard)
    make_trainer(run_dir, **trainer).test(module, data, verbose=False)
    return data


@pytest.mark.parametrize("protocol", ["lm_eval", "dsg", "cloze"])
def test_ranks_and_batches_change_no_byte(toy, tmp_path, protocol):
    evaluate(toy, tmp_path / "one", protocol)
    wanted = (tmp_path / "one" / "results.jsonl").read_bytes()
    for num_ranks in (2, 3):
        folder = tmp_path / str(num_ranks)
        evaluate(toy, folder, protocol, devices=num_ranks, strategy="ddp_fork")
        assert (folder / "results.jsonl").read_bytes() == wanted


def test_sets_and_pools_are_reported(toy, tmp_path):
    data = evaluate(toy, tmp_path, "dsg")
    counts = {
        row["domain"]: row["n"]
        for row in read_results(tmp_path)
        if row["metric"] == "accuracy" and row["guard"] == "on"
    }
    questions = data.questions("test")
    wanted = {
        name: sum(q.domain == name for q in questions) for name in ("bio", "history", "aging")
    }
    assert counts == {
        **wanted,
        "forget": wanted["bio"],
        "retain": wanted["history"] + wanted["aging"],
    }
    rows = read_results(tmp_path)
    assert {row["protocol"] for row in rows if row["metric"] == "accuracy"} == {"dsg"}
    assert {row["dataset"] for row in rows} == {"bio+history+aging"}
    assert {row["split"] for row in rows} == {"test"}
    for metric in ("alignment", "density_auroc"):
        assert [row["domain"] for row in rows if row["metric"] == metric][:1] == ["forget"]


@pytest.mark.parametrize("protocol", ["lm_eval", "dsg", "cloze"])
def test_the_size_of_batches_changes_values_by_rounding_only(toy, tmp_path, protocol):
    for size in (1, "auto"):
        evaluate(toy, tmp_path / str(size), protocol, batch_size=size)
    one, auto = (read_results(tmp_path / str(size)) for size in (1, "auto"))
    assert len(one) == len(auto) > 20
    for row, other in zip(one, auto, strict=True):
        assert {**row, "value": 0, "low": 0, "high": 0} == {
            **other,
            "value": 0,
            "low": 0,
            "high": 0,
        }
        assert row["value"] == pytest.approx(other["value"], abs=1e-5)
