"""The demonstration is a grid that runs what was chosen, as it was chosen."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from datamodules import TinyWorldData, TinyWorldRequests
from datamodules.tiny_world.texts import TinyWorldTexts
from dsg.cli.configs import value_at
from dsg.cli.demo.command import PARTS
from dsg.cli.demo.world import demo_configs, demo_grid
from dsg.cli.grid import work
from dsg.cli.grid.file import EPOCHS_KEY, GUARD_KEY, LR_KEY, Benchmark, read_grid
from dsg.cli.grid.plan import Plan
from dsg.cli.grid.tuning import Choice
from dsg.evaluation import method_name
from dsg.guard import RECIPES
from dsg.selection.splits import guard_texts

STEERING = "model.init_args.objective.init_args.steering"
GRIDS = Path(__file__).parents[4] / "configs" / "grids"


def plan_of(*parts: str, seeds=(0,), domains=("pathogen",)) -> Plan:
    options = Namespace(seeds=[*seeds], forget_domains=[*domains], parts=parts, epochs=2)
    return Plan(demo_grid(options), demo_configs(), "demo")


def test_every_method_of_a_guard_is_compared_and_the_random_one_in_several_draws():
    plan = plan_of(*PARTS)
    assert {*RECIPES, "base", "rmu", "dsg_documents"} == {*plan.benchmark.methods}
    assert [name for name in plan.kinds if name.startswith("random")] == [
        f"random_{draw}" for draw in range(5)
    ]
    guards = plan.tuning()[0].config
    assert value_at(guards["random_3"]["config"], f"{GUARD_KEY}.draw") == 3
    assert {name for name, guard in guards.items() if guard["settings_of"] == "dsg"} == {
        *("static_clamp", "dsg_window", "dsg_cusum", "dsg_near", "dsg_documents"),
        *(f"random_{draw}" for draw in range(5)),
    }


def test_the_same_settings_are_tried_as_in_the_large_grid():
    grid = read_grid(GRIDS / "tiny_world.yaml")
    assert isinstance(grid, Benchmark)
    large = grid.methods
    small = demo_grid(Namespace(seeds=[0], forget_domains=["pathogen"], parts=(), epochs=1)).methods
    tuned = [name for name, method in small.items() if method.grid]
    assert tuned == ["dsg", "farrell", "clamp_prime", "refusal_clamp", "rmu"]
    for name in tuned:
        assert (small[name].grid, small[name].epochs) == (large[name].grid, large[name].epochs)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_can_be_had_alone(part, tmp_path, monkeypatch):
    plan = plan_of(part, seeds=(0, 1), domains=("pathogen", "toxin"))
    monkeypatch.setattr(Plan, "choice", lambda *_: (Choice({}, {}, 0), []))
    monkeypatch.setattr("dsg.cli.grid.cells.Cell.is_finished", lambda *_: True)
    counts = {
        "evaluate": len(plan.evaluations(tmp_path)),
        "relearn": len(plan.attacks(tmp_path)),
        "sequential": len(plan.sequences(tmp_path)),
    }
    alone = {"evaluate": 4 * 16, "relearn": 4 * 2 * 3, "sequential": 2 * 2}
    assert counts == {**dict.fromkeys(PARTS, 0), part: alone[part]}


def test_rmu_in_a_sequence_trains_as_it_was_tuned(tmp_path, monkeypatch):
    plan = plan_of("sequential")
    chosen = {STEERING: 60.0, LR_KEY: 3e-3, EPOCHS_KEY: 2}
    monkeypatch.setattr(Plan, "choice", lambda *_: (Choice(chosen, {}, 12), []))
    [tuned] = [cell.config for cell in plan.tuning() if cell.name.endswith("steering=60,lr=0.003")]
    _, sequence = (cell.config for cell in plan.sequences(tmp_path))
    for key in (
        "trainer.gradient_clip_val",
        "data.init_args.num_train_texts",
        "model.init_args.objective",
        LR_KEY,
    ):
        assert value_at(sequence, key) == value_at(tuned, key) is not None, key
    assert value_at(sequence, "data.init_args.passes") == 2
    assert value_at(sequence, EPOCHS_KEY) == 3  # requests


def test_dsg_in_a_sequence_has_its_chosen_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(Plan, "choice", lambda *_: (Choice({"num_features": 40}, {}, 12), []))
    sequence, _ = plan_of("sequential").sequences(tmp_path)
    assert sequence.name == "seed_0/sequential/dsg"
    assert value_at(sequence.config, f"{GUARD_KEY}.num_features") == 40
    assert value_at(sequence.config, "data.init_args.forget_domain") is None


def test_guards_are_chosen_from_the_texts_that_a_request_has(tmp_path, monkeypatch):
    read = []

    def statistics(texts):
        read.append(texts)
        raise StopIteration

    module = SimpleNamespace(
        model_name="", guard_settings=SimpleNamespace(sae="", sae_id=None, method="dsg")
    )
    data = TinyWorldData(str(tmp_path))
    monkeypatch.setattr(TinyWorldData, "setup", lambda *_: None)
    monkeypatch.setattr(work, "instantiate", lambda _: (module, data))
    for name in ("load_model", "load_sae"):
        monkeypatch.setattr(work, name, lambda *_: None)
    maker = SimpleNamespace(statistics=statistics)
    monkeypatch.setattr(work, "maker_from", lambda *_: maker)
    guards = plan_of("sequential").tuning()[0].config
    with pytest.raises(StopIteration):
        work.tune_guards(tmp_path, {"dsg": {**guards["dsg"], "config": {}}}, tmp_path)
    requests = TinyWorldRequests(str(tmp_path), seed=0)
    assert read == [guard_texts(requests, near=False)["forget_selection"]]


def test_the_demo_shows_a_threshold_from_documents_beside_that_from_question_shaped_texts():
    documents, short = (
        TinyWorldData("", calibration=kind).calibration_texts(near=False)
        for kind in ("documents", "questions")
    )
    assert len(documents) == len(short)
    assert documents == TinyWorldTexts(0, "pathogen").calibration_documents()
    # A document states four facts, a question-shaped text breaks off in the first one.
    assert all(text.count(" .") >= 4 for text in documents)
    assert all(text.count(" .") < 3 for text in short)
    fixed = plan_of().methods["dsg_documents"].fixed
    assert fixed == {"data.init_args.calibration": "documents"}
    assert method_name("dsg_documents") == "DSG, threshold from documents"
