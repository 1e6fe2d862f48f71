"""The stages of the demonstration: each chooses settings or is one Lightning run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning

from datamodules import TinyWorldData, TinyWorldRequests
from datamodules.parts.loading import question_loader
from dsg.cli.demo.trainers import Tracking, make_trainer
from dsg.cli.grid.choosing import validation_scores
from dsg.cli.grid.tuning import (
    CLAMP_PRIME_GRID,
    CLAMP_VALUE,
    DSG_GRID,
    FARRELL_GRID,
    NUM_RANDOM_DRAWS,
    REFUSAL_GRID,
    RMU_CLIPPING,
    RMU_EPOCHS,
    RMU_GRID,
    RMU_TARGET,
    TRIGGER_LIMIT,
    WINDOW_SIZE,
    GuardTuner,
    best,
    combinations,
)
from dsg.cli.tiny_world import HOOK_POINT, MODEL_FOLDER, SAE_FOLDER
from dsg.guard import Guard, GuardSettings
from dsg.io import read_results
from dsg.lm import load_model
from dsg.objectives import RMU
from dsg.sae import load_sae
from dsg.selection import Selection, describe_features, guard_texts
from lightning_modules import (
    EvaluationModule,
    RelearningModule,
    SequentialModule,
    UnlearningModule,
)
from lightning_modules.parts.guards import maker_from

NUM_RMU_TEXTS = 240
NUM_ATTACK_TEXTS = 60
NUM_DESCRIBED = 8
# DSG with a threshold from retain documents; the others' comes from texts shaped like questions.
FROM_DOCUMENTS = "dsg_documents"
ATTACK_LR = {"full": 5e-4, "lora": 3e-3}


@dataclass(frozen=True)
class Cell:
    """One seed of the benchmark and the domain to be forgotten."""

    benchmark: Path
    seed: int
    forget_domain: str

    @property
    def model(self) -> str:
        """Folder of the model."""
        return str(self.benchmark / MODEL_FOLDER)

    @property
    def guard(self) -> GuardSettings:
        """What all guards of this benchmark share."""
        sae = str(self.benchmark / SAE_FOLDER)
        return GuardSettings(HOOK_POINT, sae, clamp_value=CLAMP_VALUE, max_length=128)

    def data(self, **settings: Any) -> TinyWorldData:
        """The data module of this cell."""
        return TinyWorldData(
            self.model, seed=self.seed, forget_domain=self.forget_domain, **settings
        )


@dataclass(frozen=True)
class Context:
    """What every stage of a cell needs."""

    cell: Cell
    tracking: Tracking

    def trainer(self, folder: Path, name: str, **options: Any) -> Any:
        """A trainer that logs under the cell's and the stage's name."""
        prefix = f"seed_{self.cell.seed}/{self.cell.forget_domain}/{name}"
        return make_trainer(folder, self.tracking.loggers(folder, prefix), **options)


def tune_guards(context: Context, folder: Path) -> dict[str, Any]:
    """Choose the settings of the guards on validation facts and save them all."""
    cell = context.cell
    data = cell.data()
    data.setup("validate")
    model, sae = load_model(cell.model), load_sae(cell.guard.sae)
    maker = maker_from(cell.guard, model, sae, data)
    questions = [q for q in data.questions("validation") if q.domain in ("forget", "retain")]
    questions = [replace(question, id=id) for id, question in enumerate(questions)]
    batches = question_loader(data.tokenizer, questions, data.batch_size, None)
    forget_texts = guard_texts(data, near=False)["forget_selection"]
    tuner = GuardTuner(maker, maker.statistics(forget_texts), questions, list(batches))
    grids = {
        "dsg": ({}, DSG_GRID),
        "farrell": ({}, FARRELL_GRID),
        "clamp_prime": ({}, CLAMP_PRIME_GRID),
        "refusal_clamp": ({"trigger_limit": TRIGGER_LIMIT}, REFUSAL_GRID),
    }
    choices, guards = {}, {}
    for method, (fixed, grid) in grids.items():
        settings = replace(cell.guard, method=method, **fixed)
        choices[method] = tuner.choose(settings, grid)
        guards[method] = tuner.make(replace(settings, **choices[method].settings))
    dsg = replace(cell.guard, window_size=WINDOW_SIZE, **choices["dsg"].settings)
    for method in ("static_clamp", "dsg_window", "dsg_cusum"):
        guards[method] = tuner.make(replace(dsg, method=method))
    for draw in range(NUM_RANDOM_DRAWS):
        guards[f"random_{draw}"] = tuner.make(replace(dsg, method="random", draw=draw))
    maker.calibration_texts = data.calibration_texts(near=True)
    guards["dsg_near"] = tuner.make(replace(dsg, method="dsg_near"))
    maker.calibration_texts = data.texts.calibration_documents()
    guards[FROM_DOCUMENTS] = tuner.make(dsg)
    for name, guard in guards.items():
        guard.save(folder / name)
    found = guards["dsg"].facts["selection"]
    selection = Selection(**{name: values[:NUM_DESCRIBED] for name, values in found.items()})
    features = describe_features(
        model, data.tokenizer, sae, selection, forget_texts[:200], hook_point=HOOK_POINT
    )
    return {
        "chosen": [
            {"method": method, "chosen": choice.settings, "tried": choice.tried}
            | {"validation": choice.validation}
            for method, choice in choices.items()
        ],
        "features": features,
    }


def tune_rmu(context: Context, folder: Path) -> dict[str, Any]:
    """Choose RMU's settings, number of epochs included, and save the model changed with them."""
    tries = []
    for varied in combinations(RMU_GRID):
        name = "_".join(f"{key}_{value:g}" for key, value in varied.items())
        _unlearn(context, folder / name, f"rmu/{name}", RMU_EPOCHS, varied)
        for epoch in range(1, RMU_EPOCHS + 1):
            scores = validation_scores(read_results(folder / name), epoch)
            tries.append(({**varied, "epochs": epoch}, scores))
    choice = best(tries)
    varied = {key: choice.settings[key] for key in RMU_GRID}
    _unlearn(context, folder, "rmu", choice.settings["epochs"], varied)
    # The chosen run repeats one of the tries on validation facts; it adds no result of its own.
    (folder / "results.jsonl").unlink()
    return {
        "chosen": {
            "method": "rmu",
            "chosen": choice.settings,
            "tried": choice.tried,
            "validation": choice.validation,
        }
    }


def evaluate(
    context: Context, method: str, guards: Path, rmu_model: Path | None, folder: Path
) -> dict[str, Any]:
    """Measure one method on test facts; returns the densities behind its gate, if it has one."""
    cell = context.cell
    guarded = method not in ("base", "rmu")
    module = EvaluationModule(
        str(rmu_model) if method == "rmu" else cell.model,
        guard=cell.guard.saved_in(guards / method) if guarded else None,
        base_model_name=cell.model if method == "rmu" else None,
        method=method,
        experiment="demo",
        seed=cell.seed,
        model_label="tiny_world",
    )
    trainer = context.trainer(folder, f"evaluate/{method}")
    data = cell.data()
    trainer.test(module, datamodule=data, verbose=False)
    if not guarded:
        return {}
    densities = module.measurer.samples["on", "questions"]["density"].tolist()
    domains: dict[str, list[float]] = {}
    for question in data.questions("test"):
        domains.setdefault(question.domain, []).append(densities[question.id])
    return {"threshold": Guard.load(guards / method).threshold, "domains": domains}


def relearn(
    context: Context,
    attack: Literal["full", "lora"],
    method: str,
    mode: Literal["none", "test_time", "train_time"],
    guards: Path,
    rmu_model: Path,
    epochs: int,
    folder: Path,
) -> None:
    """One relearning attack, measured on test facts after every epoch."""
    cell = context.cell
    module = RelearningModule(
        str(rmu_model) if method == "rmu" else cell.model,
        guard=None if mode == "none" else cell.guard.saved_in(guards / method),
        mode=mode,
        adapter=attack,
        lr=ATTACK_LR[attack],
        base_model_name=cell.model if method == "rmu" else None,
        method=method,
        experiment="demo",
        seed=cell.seed,
        model_label="tiny_world",
    )
    data = cell.data(allow_overlap=True, val_split="test", num_train_texts=NUM_ATTACK_TEXTS)
    trainer = context.trainer(folder, f"relearn_{attack}/{method}_{mode}", max_epochs=epochs)
    _seed(cell)
    trainer.fit(module, datamodule=data)


def sequence(context: Context, method: str, settings: dict[str, Any], folder: Path) -> None:
    """Three forget requests, one per epoch, measured on test facts after each.

    Args:
        context: Seed and tracking; its forget domain plays no role.
        method: `dsg` or `rmu`.
        settings: What was chosen for the method when it forgot a single domain.
        folder: Where the run lies.
    """
    cell = context.cell
    passes = settings.get("epochs", 1)
    guard = replace(cell.guard, **settings) if method == "dsg" else None
    changes = {"objective": _rmu(settings), "lr": settings["lr"]} if method == "rmu" else {}
    module = SequentialModule(
        cell.model,
        guard=guard,
        **changes,
        experiment="demo",
        seed=cell.seed,
        model_label="tiny_world",
    )
    data = TinyWorldRequests(
        cell.model, seed=cell.seed, num_train_texts=NUM_RMU_TEXTS, passes=passes
    )
    trainer = context.trainer(
        folder,
        f"sequential/{method}",
        max_epochs=len(data.request_domains),
        reload_dataloaders_every_n_epochs=1,
        gradient_clip_val=RMU_CLIPPING if method == "rmu" else None,
    )
    _seed(cell)
    trainer.fit(module, datamodule=data)


def _unlearn(
    context: Context, folder: Path, name: str, epochs: int, settings: dict[str, Any]
) -> None:
    cell = context.cell
    module = UnlearningModule(
        cell.model,
        _rmu(settings),
        lr=settings["lr"],
        experiment="demo",
        seed=cell.seed,
        model_label="tiny_world",
    )
    trainer = context.trainer(folder, name, max_epochs=epochs, gradient_clip_val=RMU_CLIPPING)
    _seed(cell)
    data = cell.data(num_train_texts=NUM_RMU_TEXTS)
    trainer.fit(module, datamodule=data)


def _rmu(settings: dict[str, Any]) -> RMU:
    return RMU(HOOK_POINT, steering=settings["steering"], target=RMU_TARGET)


def _seed(cell: Cell) -> None:
    """Adapters draw random initial weights."""
    lightning.seed_everything(cell.seed, verbose=False)
