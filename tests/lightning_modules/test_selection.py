"""`dsg validate` with `SelectionModule`: one process, two gloo processes, and plain Python."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsg.cli.main import main
from dsg.errors import UserError
from dsg.guard.build import build_guard
from dsg.guard.gate import OpenGate
from dsg.guard.guard import Guard
from dsg.io.results import read_results
from dsg.lm.pretrained import load_model
from dsg.sae.loading import load_sae
from dsg.selection.splits import FORGET_FRACTIONS, split_by_hash
from lightning_modules import SelectionModule
from lightning_modules.parts.guards import make_guard
from tests.helpers import HOOK_POINT, tiny_tokenizer
from tests.lightning_modules.odd_texts import OddTexts
from tests.lightning_modules.toy import ToyData, guard_settings, make_trainer

ROOT = Path(__file__).parents[2]
NUM_FEATURES = 4


@pytest.fixture(scope="module")
def runs(toy, tmp_path_factory):
    """Run directories of the same selection in one process and in two."""
    folder = tmp_path_factory.mktemp("selection")
    config = {
        "model": {
            "class_path": "lightning_modules.SelectionModule",
            "init_args": {
                "model_name": str(toy / "model"),
                "guard": vars(guard_settings(toy, num_features=NUM_FEATURES)),
            },
        },
        "data": {"class_path": "tests.lightning_modules.odd_texts.OddTexts"},
        "trainer": {"accelerator": "cpu", "devices": 1, "logger": False},
    }
    (folder / "select.yaml").write_text(yaml.safe_dump(config))
    words = ["validate", "-c", str(folder / "select.yaml"), "--run_dir"]
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    two = subprocess.run(
        [sys.executable, "-m", "dsg", *words, str(folder / "two"), *ranks],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert two.returncode == 0, two.stderr
    assert main([*words, str(folder / "one")]) == 0
    return folder / "one", folder / "two"


@pytest.fixture(scope="module")
def build(toy):
    """`build_guard` on the texts of the runs."""
    data = OddTexts()
    model, sae = load_model(str(toy / "model")), load_sae(str(toy / "sae"))

    def build(num_features: int) -> Guard:
        return build_guard(
            model,
            tiny_tokenizer(),
            sae,
            data.forget_texts(),
            data.retain_texts(),
            hook_point=HOOK_POINT,
            num_features=num_features,
            ratio_percentile=50.0,
            threshold_percentile=60.0,
            clamp_value=-30.0,
            calibration_texts=data.calibration_texts(near=False),
            heldout_texts=data.heldout_texts(),
            batch_size=4,
        )

    return build


def read_sweep(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_texts_go_round_on_no_two_ranks():
    data = OddTexts()
    selection, heldout = split_by_hash(data.forget_texts(), FORGET_FRACTIONS)
    sizes = [len(selection), len(data.retain_texts()), len(data.calibration_texts(near=False))]
    batches = [-(-size // 4) for size in [*sizes, len(data.heldout_texts()), len(heldout)]]
    assert any(size % 2 for size in batches)
    assert len(data.calibration_texts(near=False)) % 2 == len(data.retain_texts()) % 2 == 1


@pytest.mark.parametrize(
    "name", ["results.jsonl", "sweep.csv", "guard/guard.safetensors", "guard/guard.json"]
)
def test_two_processes_write_the_bytes_of_one(runs, name):
    one, two = (run_dir / name for run_dir in runs)
    assert one.read_bytes() == two.read_bytes()


def test_the_guard_is_what_build_guard_builds(runs, build):
    found, expected = Guard.load(runs[0] / "guard"), build(NUM_FEATURES)
    assert found.feature_ids == expected.feature_ids
    assert len(found.feature_ids) == NUM_FEATURES
    assert found.threshold == expected.threshold
    assert found.edit == expected.edit
    assert found.facts["selection"]["forget_scores"] == list(
        expected.facts["selection"]["forget_scores"]
    )
    assert found.facts["false_positive_rate"] == expected.facts["false_positive_rate"]
    for name, buffer in expected.features.named_buffers():
        assert found.features.get_buffer(name).equal(buffer)


def test_the_sweep_holds_what_build_guard_finds_for_each_number_of_features(runs, build):
    rows = read_sweep(runs[0])
    assert [row["num_features"] for row in rows] == ["1", "2", "3", "4"]
    thresholds = set()
    for row in rows:
        guard = build(int(row["num_features"]))
        rate, forget = (
            guard.facts[f"{name}_rate"] for name in ("false_positive", "forget_trigger")
        )
        assert float(row["threshold"]) == guard.threshold
        assert float(row["false_positive_rate"]) == rate["value"]
        assert (float(row["low"]), float(row["high"])) == (rate["low"], rate["high"])
        assert int(row["n"]) == rate["n"] == 11
        assert float(row["forget_trigger_rate"]) == forget["value"]
        thresholds.add(guard.threshold)
    assert len(thresholds) > 1


def test_results_hold_threshold_and_rates(runs, build):
    guard = build(NUM_FEATURES)
    rows = {row["metric"]: row for row in read_results(runs[0])}
    assert set(rows) == {"threshold", "false_positive_rate", "forget_trigger_rate"}
    assert rows["threshold"]["n"] == 19
    for name, value in (
        ("threshold", guard.threshold),
        ("false_positive_rate", guard.facts["false_positive_rate"]["value"]),
        ("forget_trigger_rate", guard.facts["forget_trigger_rate"]["value"]),
    ):
        assert rows[name]["value"] == pytest.approx(value, rel=1e-5)
        assert (rows[name]["experiment"], rows[name]["method"]) == ("selection", "dsg")
    low, high = (guard.facts["false_positive_rate"][bound] for bound in ("low", "high"))
    assert rows["false_positive_rate"]["low"] == pytest.approx(low, rel=1e-5)
    assert rows["false_positive_rate"]["high"] == pytest.approx(high, rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "random", "num_features": 2},
        {"gate": "window", "window_size": 3},
        {"gate": "cusum"},
        {"method": "refusal_clamp", "max_retain_frequency": 1.0},
        {"method": "static_clamp"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_kind_of_guard_is_the_one_that_other_runs_make(toy, tmp_path, changes):
    settings = guard_settings(toy, **{"num_features": 3, **changes})
    module, data = SelectionModule(str(toy / "model"), settings), OddTexts()
    trainer = make_trainer(tmp_path)
    trainer.validate(module, data, verbose=False)
    assert module.model is not None
    expected = make_guard(settings, module.model, trainer)
    found = Guard.load(tmp_path / "guard")
    assert found.feature_ids == expected.feature_ids
    for name in ("gate", "edit", "refusal_id"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("false_positive_rate", "forget_trigger_rate", "calibration"):
        assert found.facts.get(name) == expected.facts.get(name)
    last = read_sweep(tmp_path)[-1]
    if not isinstance(expected.gate, OpenGate):  # which has no threshold
        assert float(last["threshold"]) == expected.threshold


def test_near_texts_calibrate_where_the_method_says_so(toy, tmp_path):
    module = SelectionModule(str(toy / "model"), guard_settings(toy, method="dsg_near"))
    make_trainer(tmp_path).validate(module, OddTexts(), verbose=False)
    rows = {row["metric"]: row for row in read_results(tmp_path)}
    assert (rows["threshold"]["n"], rows["threshold"]["method"]) == (27, "dsg_near")


def test_a_second_validation_begins_anew(toy, tmp_path):
    module, trainer = SelectionModule(str(toy / "model"), guard_settings(toy)), None
    written = []
    for _ in range(2):
        trainer = trainer or make_trainer(tmp_path)
        trainer.validate(module, OddTexts(), verbose=False)
        written.append((tmp_path / "guard" / "guard.json").read_bytes())
    assert written[0] == written[1]


def test_data_for_another_kind_of_run(toy, tmp_path):
    module = SelectionModule(str(toy / "model"), guard_settings(toy))
    with pytest.raises(UserError, match=r"`data` must yield texts for .*; choose"):
        make_trainer(tmp_path).validate(module, ToyData(), verbose=False)


def test_a_saved_guard_cannot_be_selected_again(toy):
    with pytest.raises(UserError, match=r"`artifact` must be left out .* got 'saved'"):
        SelectionModule(str(toy / "model"), guard_settings(toy, artifact="saved"))
