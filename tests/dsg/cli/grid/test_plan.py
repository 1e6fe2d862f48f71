"""The cells of a benchmark grid, with made-up outcomes instead of runs."""

from collections.abc import Iterable

import pytest

from dsg.cli.configs import value_at
from dsg.cli.grid.cells import Cell
from dsg.cli.grid.file import Attack, Benchmark, Method
from dsg.cli.grid.plan import TUNE_GUARDS, Place, Plan
from dsg.cli.grid.recovery import sum_up
from dsg.cli.grid.tuning import best, validation_scores
from dsg.errors import UserError
from dsg.io.results import row, write_results, write_run_facts

MODEL = {"model_name": "tiny_world:0/model", "seed": 0}
DATA = {"class_path": "D", "init_args": {"model_name": "tiny_world:0/model", "seed": 0}}
GUARD = {"sae": "tiny_world:0/sae", "hook_point": "h", "method": "dsg", "num_features": 3}


def config(kind, **init_args):
    module = {"class_path": f"lightning_modules.{kind}Module", "init_args": {**MODEL, **init_args}}
    return {"model": module, "data": DATA, "trainer": {"max_epochs": 3}}


CONFIGS = {
    "base.yaml": config("Evaluation"),
    "dsg.yaml": config("Evaluation", guard=GUARD),
    "near.yaml": config("Evaluation", guard={**GUARD, "method": "dsg_near"}),
    "npo.yaml": config("Unlearning", lr=0.1),
    "attack.yaml": config("Relearning", guard=GUARD, mode="test_time"),
}
FEATURES = "model.init_args.guard.num_features"
LR = "model.init_args.lr"
GRID = Benchmark(
    seeds=[0, 1],
    tries=4,
    methods={
        "base": Method("base.yaml"),
        "dsg": Method("dsg.yaml", {FEATURES: [1, 2, 3, 4]}),
        "dsg_near": Method("near.yaml", settings_of="dsg"),
        "npo": Method("npo.yaml", {LR: [0.1, 0.2]}, [1, 2]),
    },
    attacks={"relearn_full": Attack("attack.yaml", [0.01, 0.02], guarded={"model.x": 1})},
    attacked=["base", "dsg_test_time", "dsg_train_time", "npo"],
    epochs=2,
)


@pytest.fixture
def plan():
    return Plan(GRID, CONFIGS, "grid")


def measured(epoch, alignment, **fields):
    """Rows of one evaluation on validation facts."""
    place = {"split": "validation", "protocol": "cloze", "epoch": epoch, "guard": "none", **fields}
    values = {("forget", "alignment"): alignment, ("forget", "accuracy"): 1 - alignment}
    values["retain", "accuracy"] = 0.9
    return [row(domain=d, metric=m, value=v, **place) for (d, m), v in values.items()]


def finish(run_dir, cells: Iterable[Cell], alignments=None, seconds=2.0):
    """Pretend that cells were done; `alignments` by (lr, epoch) of a fit."""
    for cell in cells:
        folder = cell.folder(run_dir)
        folder.mkdir(parents=True)
        outcome = None
        if cell.command == TUNE_GUARDS:
            tries = [({"num_features": n}, {"alignment": n / 10}) for n in (1, 2, 3, 4)]
            chosen = {"num_features": 4}
            guards = {"dsg": {"tries": tries, "chosen": chosen, "seconds": 5.0}}
            guards["dsg_near"] = {"tries": [], "chosen": chosen, "seconds": 6.0}
            outcome = {"guards": guards, "features": []}
        if alignments and "/tune/" in cell.name:
            lr = value_at(cell.config, LR)
            found = [measured(e, a) for (one, e), a in alignments.items() if one == lr]
            write_results(folder, [each for rows in found for each in rows])
        write_run_facts(folder, {"unlearn_seconds": seconds})
        cell.finish(run_dir, 1.0, outcome)


ALIGNMENTS = {(0.1, 1): 0.2, (0.1, 2): 0.7, (0.2, 1): 0.9, (0.2, 2): 0.6}


def test_every_combination_is_tried_on_validation_facts(plan):
    cells = plan.tuning()
    assert [cell.name for cell in cells if cell.name.startswith("seed_1")] == [
        "seed_1/pathogen/guards",
        "seed_1/pathogen/tune/npo/lr=0.1",
        "seed_1/pathogen/tune/npo/lr=0.2",
    ]
    fit = cells[-1].config
    assert value_at(fit, LR) == 0.2
    assert value_at(fit, "trainer.max_epochs") == 2
    assert value_at(fit, "data.init_args.val_split") == "validation"
    assert value_at(fit, "data.init_args.forget_domain") == "pathogen"
    assert value_at(fit, "model.init_args.model_name") == "tiny_world:1/model"
    guards = cells[0].config
    assert guards["dsg"]["grid"] == {FEATURES: [1, 2, 3, 4]}
    assert guards["dsg_near"]["settings_of"] == "dsg"


def test_the_best_try_is_run_again_for_as_many_epochs(plan, tmp_path):
    finish(tmp_path, plan.tuning(), ALIGNMENTS)
    choice, tries = plan.choice(Place(0, "pathogen"), "npo", tmp_path)
    assert choice.settings == {LR: 0.2, "trainer.max_epochs": 1}
    assert choice.tried == len(tries) == 4
    assert choice.validation["alignment"] == 0.9
    first, second = plan.unlearning(tmp_path)
    assert (first.name, second.name) == (
        "seed_0/pathogen/unlearn/npo",
        "seed_1/pathogen/unlearn/npo",
    )
    assert value_at(first.config, "trainer.max_epochs") == 1
    assert value_at(first.config, LR) == 0.2
    finish(tmp_path, [first], seconds=3.5)
    assert plan.seconds(Place(0, "pathogen"), "npo", tmp_path) == 3.5
    assert plan.seconds(Place(0, "pathogen"), "dsg_near", tmp_path) == 6.0
    assert plan.seconds(Place(0, "pathogen"), "base", tmp_path) is None


def test_evaluations_read_what_the_earlier_cells_left(plan, tmp_path):
    finish(tmp_path, plan.tuning(), ALIGNMENTS)
    finish(tmp_path, plan.unlearning(tmp_path))
    cells = {cell.name: cell for cell in plan.evaluations(tmp_path)}
    assert len(cells) == 8
    npo = cells["seed_1/pathogen/evaluate/npo"]
    assert npo.command == "test"
    init_args = npo.config["model"]["init_args"]
    assert init_args["model_name"] == "{run_dir}/cells/seed_1/pathogen/unlearn/npo/model"
    assert init_args["base_model_name"] == "tiny_world:1/model"
    assert init_args["method"] == "npo"
    assert value_at(npo.config, "data.init_args.model_name") == "tiny_world:1/model"
    near = cells["seed_0/pathogen/evaluate/dsg_near"].config["model"]["init_args"]
    assert near["guard"]["artifact"] == "{run_dir}/cells/seed_0/pathogen/guards/dsg_near"
    base = cells["seed_0/pathogen/evaluate/base"]
    assert "base_model_name" not in base.config["model"]["init_args"]
    assert base.after == []


def test_attacks_differ_only_in_what_is_attacked(plan, tmp_path):
    finish(tmp_path, plan.tuning(), ALIGNMENTS)
    finish(tmp_path, plan.unlearning(tmp_path))
    attacks = plan.attacks(tmp_path)
    assert len(attacks) == 2 * 4 * 2
    by_name = {one.cell.name: one.cell.config for one in attacks}
    prefix = "seed_0/pathogen/relearn_full"
    base = by_name[f"{prefix}/base/lr=0.01"]["model"]["init_args"]
    assert (base["guard"], base["mode"]) == (None, "none")
    dsg = by_name[f"{prefix}/dsg_train_time/lr=0.02"]
    assert dsg["model"]["init_args"]["mode"] == "train_time"
    assert dsg["model"]["init_args"]["guard"]["artifact"].endswith("guards/dsg")
    assert dsg["model"]["x"] == 1
    npo = by_name[f"{prefix}/npo/lr=0.01"]["model"]["init_args"]
    assert npo["model_name"].endswith("unlearn/npo/model")
    assert npo["base_model_name"] == "tiny_world:0/model"
    assert {str(found["data"]) for name, found in by_name.items() if prefix in name} == {
        str(dsg["data"])
    }
    assert {found["trainer"]["max_epochs"] for found in by_name.values()} == {2}
    assert {found["model"]["init_args"]["lr"] for found in by_name.values()} == {0.01, 0.02}


def test_what_has_failed_has_no_later_cells(plan, tmp_path):
    done = [cell for cell in plan.tuning() if cell.name != "seed_0/pathogen/tune/npo/lr=0.2"]
    done = [cell for cell in done if cell.name != "seed_1/pathogen/guards"]
    finish(tmp_path, done, ALIGNMENTS)
    assert plan.choice(Place(0, "pathogen"), "npo", tmp_path) is None
    cells = plan.unlearning(tmp_path)
    assert [cell.name for cell in cells] == ["seed_1/pathogen/unlearn/npo"]
    names = [cell.name for cell in plan.evaluations(tmp_path)]
    assert names == [
        "seed_0/pathogen/evaluate/base",
        "seed_0/pathogen/evaluate/dsg",
        "seed_0/pathogen/evaluate/dsg_near",
        "seed_1/pathogen/evaluate/base",
    ]


def test_another_choice_makes_other_cells(plan, tmp_path):
    finish(tmp_path, plan.tuning(), ALIGNMENTS)
    finish(tmp_path, plan.unlearning(tmp_path))
    before = {cell.name: cell.digest for cell in plan.evaluations(tmp_path)}
    method = Method("npo.yaml", {LR: [0.1, 0.2]}, [1, 2], fixed={"model.init_args.z": 1})
    other = Plan(
        changed_methods(npo=method),
        CONFIGS,
        "grid",
    )
    for cell in other.tuning():
        cell.clear(tmp_path)
    finish(tmp_path, other.tuning(), ALIGNMENTS)
    for cell in other.unlearning(tmp_path):
        cell.clear(tmp_path)
    finish(tmp_path, other.unlearning(tmp_path))
    after = {cell.name: cell.digest for cell in other.evaluations(tmp_path)}
    moved = {name for name in before if before[name] != after[name]}
    assert moved == {f"seed_{seed}/pathogen/evaluate/npo" for seed in (0, 1)}


def changed_methods(**methods):
    return Benchmark(**{**vars(GRID), "methods": {**GRID.methods, **methods}})


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"base": Method("base.yaml", {LR: [1, 2, 3, 4]})}, "evaluates a model as it is"),
        ({"dsg": Method("dsg.yaml", {FEATURES: [1, 2]}, [1, 2])}, "remove its `epochs`"),
        ({"dsg": Method("dsg.yaml", {"data.x": [1, 2, 3, 4]})}, "must vary keys below"),
        ({"dsg_near": Method("npo.yaml", settings_of="dsg")}, "use it for guards only"),
        ({"base": Method("npo.yaml")}, "must hold the model that forgets nothing"),
    ],
)
def test_entries_must_fit_the_kind_of_method(methods, message):
    with pytest.raises(UserError, match=message):
        Plan(changed_methods(**methods), CONFIGS, "grid")


@pytest.mark.parametrize(
    ("attacked", "message"),
    [
        (["base", "npo_test_time"], "names a mode for 'npo', which is no guard"),
        (["dsg_train_time"], "as the control"),
        (["dsg_test_time"], "as the control"),  # this attacker sees the guard
    ],
)
def test_what_is_attacked_must_fit(attacked, message):
    with pytest.raises(UserError, match=message):
        Plan(Benchmark(**{**vars(GRID), "attacked": attacked}), CONFIGS, "grid")


def curve(values, guard="none", **fields):
    place = {"domain": "forget", "metric": "accuracy", "protocol": "cloze", "guard": guard}
    return [row(value=v, epoch=e, **{**place, **fields}) for e, v in enumerate(values)]


def test_the_attackers_best_rate_is_reported_beside_all_of_them(plan, tmp_path):
    finish(tmp_path, plan.tuning(), ALIGNMENTS)
    finish(tmp_path, plan.unlearning(tmp_path))
    attacks = plan.attacks(tmp_path)
    accuracies = {0.01: [0.2, 0.3, 0.4], 0.02: [0.2, 0.6, 1.0]}
    for one in attacks:
        if one.place.seed == 1 and one.method == "npo" and one.lr == 0.02:
            continue  # failed
        fields = {"method": one.method, "mode": one.mode, "attack": one.attack}
        rows = curve(accuracies[one.lr], **fields) if one.method == "npo" else []
        if one.method == "base":
            rows = curve([1.0, 1.0, 1.0], **fields)
        if one.method == "dsg":
            rows = curve([1.0, 1.0, 1.0], "off", **fields) + curve([0.2, 0.2, 0.2], "on", **fields)
        finish(tmp_path, [one.cell])
        write_results(one.cell.folder(tmp_path), rows)
    found = sum_up(attacks, tmp_path, "base")
    npo = [line for line in found.attempts if line["method"] == "npo"]
    assert {line["facts"] for line in npo} == {"forget"}
    assert [(line["seed"], line["lr"], line["best"]) for line in npo] == [
        (0, 0.01, False),
        (0, 0.02, True),
    ]
    # Shares of what was lost: 0, 1/2, 1; the area by trapezoids is (1/4 + 3/4) / 2.
    assert npo[1]["recovery_area"] == pytest.approx(0.5)
    assert npo[1]["epochs_to_half"] == pytest.approx(1.0)
    rows = [each for each in found.rows if each["method"] == "npo"]
    assert [r["value"] for r in rows if r["metric"] == "accuracy"] == [0.2, 0.6, 1.0]
    assert {r["metric"] for r in rows} == {"accuracy", "recovery_area", "epochs_to_half"}
    dsg = {
        (r["mode"], r["guard"], r["metric"]): r["value"]
        for r in found.rows
        if r["method"] == "dsg" and r["metric"] != "accuracy"
    }
    assert dsg["test_time", "on", "recovery_area"] == 0.0
    assert dsg["test_time", "on", "epochs_to_half"] is None
    assert dsg["test_time", "off", "recovery_area"] is None  # nothing was lost


def shown_curves(shown, unshown, guard="none", **fields):
    both = [(a + b) / 2 for a, b in zip(shown, unshown, strict=True)]
    return [
        found
        for domain, values in (
            ("forget", both),
            ("forget_shown", shown),
            ("forget_unshown", unshown),
        )
        for found in curve(values, guard, domain=domain, **fields)
    ]


def test_recovery_is_of_shown_facts_and_damage_to_others_is_told_apart(plan, tmp_path):
    """By hand: the low rate brings shown facts back, the high one only spares the others."""
    finish(tmp_path, plan.tuning(), ALIGNMENTS)
    finish(tmp_path, plan.unlearning(tmp_path))
    attacks = plan.attacks(tmp_path)
    damage = {0.01: [1.0, 0.8, 0.7], 0.02: [1.0, 1.0, 1.0]}
    for one in attacks:
        fields = {"method": one.method, "mode": one.mode, "attack": one.attack}
        if one.method == "base":
            rows = shown_curves([1.0, 1.0, 1.0], damage[one.lr], **fields)
        elif one.method == "npo":
            shown = {0.01: [0.2, 0.6, 1.0], 0.02: [0.2, 0.3, 0.4]}[one.lr]
            rows = shown_curves(shown, {0.01: [0.2, 0.2, 0.2], 0.02: [0.2, 0.9, 1.0]}[one.lr])
            rows = [{**found, **fields} for found in rows]
        else:
            weights = [1.0, 0.9, 0.6]
            rows = shown_curves([1.0, 1.0, 1.0], weights, "off", **fields)
            rows += shown_curves([0.2, 0.2, 0.2], [0.2, 0.1, 0.1], "on", **fields)
        finish(tmp_path, [one.cell])
        write_results(one.cell.folder(tmp_path), rows)
    found = sum_up(attacks, tmp_path, "base")
    [best] = [
        each
        for each in found.attempts
        if (each["method"], each["seed"], each["best"]) == ("npo", 0, True)
    ]
    assert (best["lr"], best["facts"], best["accuracy"]) == (0.01, "forget_shown", 1.0)
    assert best["recovery_area"] == pytest.approx(0.5)
    assert best["epochs_to_half"] == pytest.approx(1.0)
    measured = {
        (each["method"], each["guard"], each["domain"], each["metric"]): each["value"]
        for each in found.rows
        if each["seed"] in (0, None) and each["mode"] in (None, "test_time")
    }
    unshown = ("forget_unshown", "collateral_damage")
    # Beside the model without guard, attacked with the same rate: 0.7 of the facts not shown.
    assert measured["npo", "none", *unshown] == pytest.approx(0.7 - 0.2)
    assert measured["dsg", "on", *unshown] == pytest.approx(0.7 - 0.6)  # of the weights below
    assert measured["dsg", "off", *unshown] == pytest.approx(0.7 - 0.6)
    # The attack's own damage, beside the same model before it.
    assert measured["base", "none", *unshown] == pytest.approx(1.0 - 0.7)
    assert measured["npo", "none", "forget_shown", "recovery_area"] == pytest.approx(0.5)


def test_below_a_guard_at_test_time_stands_the_control(tmp_path):
    attacks = {"relearn_full": Attack("attack.yaml", [0.01])}
    grid = {**vars(GRID), "attacks": attacks, "attacked": ["dsg_test_time", "dsg_train_time"]}
    plan = Plan(Benchmark(**grid), CONFIGS, "grid")
    finish(tmp_path, plan.tuning(), ALIGNMENTS)
    finish(tmp_path, plan.unlearning(tmp_path))
    attacks = plan.attacks(tmp_path)
    for one in attacks:
        fields = {"method": "dsg", "mode": one.mode, "attack": one.attack, "seed": one.place.seed}
        weights = [1.0, 0.8] if one.mode == "test_time" else [1.0, 0.5]
        rows = curve(weights, "off", **fields) + curve([0.2, 0.6], "on", **fields)
        finish(tmp_path, [one.cell])
        write_results(one.cell.folder(tmp_path), rows)
    summary = sum_up(attacks, tmp_path, "base")
    base = [r for r in summary.rows if r["method"] == "base" and r["metric"] == "accuracy"]
    assert [(r["seed"], r["epoch"], r["value"]) for r in base] == [
        (seed, epoch, value) for seed in (0, 1) for epoch, value in ((0, 1.0), (1, 0.8))
    ]
    assert {(r["mode"], r["guard"]) for r in base} == {(None, "none")}
    # Its own attack lost nothing to begin with, and it is one of the attempts.
    attempts = {(a["method"], a["mode"]) for a in summary.attempts}
    assert attempts == {("base", None), ("dsg", "test_time"), ("dsg", "train_time")}


def test_draws_are_methods_of_their_own_but_cannot_be_attacked():
    random = Method("dsg.yaml", settings_of="dsg", draws=2)
    plan = Plan(changed_methods(random=random), CONFIGS, "grid")
    guards = plan.tuning()[0].config
    draw = "model.init_args.guard.draw"
    assert [value_at(guards[f"random_{i}"]["config"], draw) for i in (0, 1)] == [0, 1]
    assert "random" not in guards
    assert "methods.random" in plan.first()
    attacked = {"attacked": ["base", "random_test_time"], "methods": plan.benchmark.methods}
    with pytest.raises(UserError, match="must name entries of `methods`, got 'random'"):
        Benchmark(**{**vars(GRID), **attacked})
    with pytest.raises(UserError, match="must be at least 1, got 0"):
        changed_methods(random=Method("dsg.yaml", draws=0))


def test_the_first_of_the_best_tries_is_chosen():
    tries = [({"n": n}, {"alignment": a}) for n, a in ((1, 0.2), (2, 0.9), (3, 0.9))]
    choice = best([*tries, ({"n": 4}, {"alignment": 0.1})])
    assert (choice.settings, choice.tried) == ({"n": 2}, 4)


def test_validation_scores_are_those_of_the_epoch_with_the_guard_on():
    rows = measured(1, 0.5) + measured(2, 0.75) + measured(2, 0.1, guard="off")
    assert validation_scores(rows, 2) == {
        "alignment": 0.75,
        "forget_accuracy": 0.25,
        "retain_accuracy": 0.9,
    }
    with pytest.raises(UserError, match=r"no alignment of the domain 'forget' after epoch 3"):
        validation_scores(rows, 3)
    with pytest.raises(UserError, match="val_split"):
        validation_scores(measured(1, 0.5, split="test"), 1)


def test_first_holds_one_configuration_of_each_kind(plan):
    found = plan.first()
    assert {name: command for name, (command, _) in found.items()} == {
        "methods.base": "test",
        "methods.dsg": "test",
        "methods.dsg_near": "test",
        "methods.npo": "fit",
        "attacks.relearn_full": "fit",
    }
    assert value_at(found["methods.dsg"][1], FEATURES) == 1
