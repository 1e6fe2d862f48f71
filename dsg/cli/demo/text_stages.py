"""The stages of the demonstration on the user's own text."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning
import torch

from datamodules import TextFilesData
from datamodules.parts.loading import passage_loader
from dsg.cli.demo.draws import mean_over_draws
from dsg.cli.demo.text_model import TextFiles
from dsg.cli.demo.trainers import Tracking, make_trainer
from dsg.cli.grid.tuning import combinations
from dsg.errors import UserError
from dsg.evaluation import Passage, auroc, score_all
from dsg.guard import Guard, GuardSettings
from dsg.io import read_results, write_results
from dsg.lm import load_model
from dsg.sae import load_sae
from dsg.selection import Selection, describe_features
from lightning_modules import EvaluationModule, RelearningModule
from lightning_modules.parts.guards import maker_from

EXPERIMENT = "text_demo"
MAX_LENGTH = 128
CLAMP_VALUE = -0.7  # in residual norms, as on the embedded benchmark
GRID = {"ratio_percentile": [90.0, 95.0, 98.0], "num_features": [20, 40, 80]}
NUM_RANDOM_DRAWS = 3
ATTACK_LR = {"full": 5e-4, "lora": 3e-3}

Part = Literal["memorised", "unseen"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextCell:
    """One model of the user's text.

    Attributes:
        files: What the user gave.
        seed: Of the run.
        model: Folder or hub name.
        model_label: How the results call it.
        sae: Folder or release of the SAE.
        sae_id: Id within the release.
        hook_point: Where the SAE reads.
        tracking: Where the stages log.
        trained: Whether it was trained on this text, so that some passages are memorised.
        rounds: What was measured after each round of that training.
        max_texts: Forget texts, and retain texts, to select features with.
    """

    files: TextFiles
    seed: int
    model: str
    model_label: str
    sae: str
    sae_id: str | None
    hook_point: str
    tracking: Tracking
    trained: bool = True
    rounds: tuple[dict[str, float], ...] = ()
    max_texts: int = 1000

    @property
    def guard(self) -> GuardSettings:
        """What all guards share."""
        return GuardSettings(
            self.hook_point,
            self.sae,
            self.sae_id,
            clamp_value=CLAMP_VALUE,
            clamp_unit="residual_norm",
            max_length=MAX_LENGTH,
        )

    def data(self, **settings: Any) -> TextFilesData:
        """The data module of these files."""
        return TextFilesData(
            self.model,
            self.files.forget,
            self.files.retain,
            seed=self.seed,
            max_length=MAX_LENGTH,
            max_texts=self.max_texts,
            **settings,
        )

    def labels(self, **settings: Any) -> dict[str, Any]:
        """Columns that all modules of this cell share."""
        shared = {"experiment": EXPERIMENT, "seed": self.seed, "model_label": self.model_label}
        return {**shared, **settings}

    def trainer(self, folder: Path, name: str, **options: Any) -> lightning.Trainer:
        """A trainer that logs under the cell's and the stage's name."""
        loggers = self.tracking.loggers(folder, f"seed_{self.seed}/text/{name}")
        return make_trainer(folder, loggers, **options)


def tune_guards(cell: TextCell, parts: Sequence[Part], folder: Path) -> dict[str, Any]:
    """Choose the features by the density AUROC on validation passages and save all guards."""
    data = cell.data()
    data.setup("validate")
    model, sae = load_model(cell.model), load_sae(cell.sae, cell.sae_id)
    maker = maker_from(cell.guard, model, sae, data)
    forget = maker.statistics(data.forget_texts())

    def make(settings: GuardSettings) -> Guard:
        one = copy.copy(maker)
        one.settings = settings
        return one.make(forget)

    passages = _validation_passages(data, parts)
    batches = list(passage_loader(data.tokenizer, passages, data.batch_size, None, MAX_LENGTH))
    plain = score_all(model, batches)
    tries = []
    for varied in combinations(GRID):
        guard = make(replace(cell.guard, **varied))
        found = _validate(passages, plain, score_all(model, batches, guard))
        tries.append((varied, found))
    chosen, validation = max(tries, key=lambda one: one[1]["density_auroc"])
    dsg = replace(cell.guard, **chosen)
    settings = {"dsg": dsg, "static_clamp": replace(dsg, method="static_clamp")}
    guards = {name: make(one) for name, one in settings.items()}
    for draw in range(NUM_RANDOM_DRAWS):
        try:
            guards[f"random_{draw}"] = make(replace(dsg, method="random", draw=draw))
        except UserError as error:  # a control that cannot be had must not cost the run
            _log.warning("There is no control: %s", error)
            break
    for name, guard in guards.items():
        guard.save(folder / name)
    selected = guards["dsg"].facts["selection"]
    strongest = Selection(*(tuple(selected[key][:8]) for key in selected))
    features = describe_features(
        model,
        data.tokenizer,
        sae,
        strongest,
        data.forget_texts()[:200],
        hook_point=cell.hook_point,
    )
    return {
        "chosen": [
            {"method": "dsg", "chosen": chosen, "tried": len(tries), "validation": validation}
        ],
        "features": features,
    }


def evaluate(cell: TextCell, method: str, part: Part, guards: Path, folder: Path) -> dict[str, Any]:
    """Measure one method on test passages; returns the densities behind its gate, if it has one."""
    guarded = method != "base"
    module = EvaluationModule(
        cell.model,
        guard=cell.guard.saved_in(guards / method) if guarded else None,
        **cell.labels(method=method),
    )
    data = cell.data(part=part)
    cell.trainer(folder, f"evaluate/{method}/{part}").test(module, datamodule=data, verbose=False)
    if not guarded:
        return {}
    densities = module.measurer.samples["on", "passages"]["density"].tolist()
    domains: dict[str, list[float]] = {}
    for passage in data.passages("test"):
        domains.setdefault(passage.domain, []).append(densities[passage.id])
    return {"threshold": Guard.load(guards / method).threshold, "domains": domains}


def evaluate_random(cell: TextCell, part: Part, guards: Path, folder: Path) -> None:
    """Evaluate all draws of random features; the rows hold their mean and its interval.

    Where the SAE has too few features for the control there is no row.
    """
    rows: list[dict[str, Any]] = []
    for draw in sorted(guards.glob("random_*")):
        evaluate(cell, draw.name, part, guards, folder / draw.name)
        rows += read_results(folder / draw.name)
    write_results(folder, mean_over_draws(rows))


def relearn(
    cell: TextCell,
    attack: Literal["full", "lora"],
    mode: Literal["test_time", "train_time"],
    guards: Path,
    epochs: int,
    folder: Path,
) -> None:
    """One relearning attack, measured on test passages after every epoch."""
    module = RelearningModule(
        cell.model,
        guard=cell.guard.saved_in(guards / "dsg"),
        mode=mode,
        adapter=attack,
        lr=ATTACK_LR[attack],
        **cell.labels(),
    )
    data = cell.data(allow_overlap=True, val_split="test")
    trainer = cell.trainer(folder, f"relearn_{attack}/{mode}", max_epochs=epochs)
    lightning.seed_everything(cell.seed, verbose=False)  # adapters draw random initial weights
    trainer.fit(module, datamodule=data)


def _validation_passages(data: TextFilesData, parts: Sequence[Part]) -> list[Passage]:
    found: list[Passage] = []
    for part in parts:
        data.part = part
        found += data.passages("validation")
    return [replace(passage, id=id) for id, passage in enumerate(found)]


def _validate(
    passages: Sequence[Passage], plain: dict[str, torch.Tensor], guarded: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Density AUROC, trigger rates, and what the guard adds to the loss, in nats per token."""
    found: dict[str, float] = {}
    densities = {}
    for domain in ("forget", "retain"):
        of = torch.tensor([passage.domain == domain for passage in passages])
        densities[domain] = guarded["density"][of].tolist()
        found[f"{domain}_trigger_rate"] = guarded["triggered"][of].mean().item()
        added = (guarded["nll_sum"][of] - plain["nll_sum"][of]).sum()
        found[f"{domain}_added_loss"] = (added / plain["num_tokens"][of].sum()).item()
    return {"density_auroc": auroc(densities["forget"], densities["retain"]).value, **found}
