"""`dsg demo` on the user's own text: what can be measured without questions, by a grid's cells."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from datamodules.text_files.files import file_facts, read_uses
from dsg.cli.configs import Config, changed
from dsg.cli.demo.pretrained import open_pretrained
from dsg.cli.demo.text_model import Sizes, TextFiles, ensure_text_model, read_training
from dsg.cli.demo.world import num_jobs
from dsg.cli.grid.cells import Cell
from dsg.cli.grid.kinds import quiet, tracked
from dsg.cli.grid.recovery import mean_over_draws
from dsg.cli.grid.run import Rounds, densities_of
from dsg.cli.grid.workers import Workers
from dsg.cli.process import calm_libraries, resumable
from dsg.cli.tiny_world import HOOK_POINT, MODEL_FOLDER, SAE_FOLDER
from dsg.errors import UserError
from dsg.io import read_json, write_atomically, write_results, write_run_facts
from dsg.io.run_directory import run_directory
from dsg.lm import short_name
from dsg.report import (
    ChosenSettings,
    Densities,
    build_report,
    results_table,
    write_drawn,
)

EXPERIMENT = "text_demo"
SIZES = Sizes()
GRID = {"ratio_percentile": [90.0, 95.0, 98.0], "num_features": [20, 40, 80]}
NUM_RANDOM_DRAWS = 3
INPUTS_FILE = "inputs.json"
_WORK = "dsg.cli.demo.text_work"
_MAX_LENGTH = 128
_CLAMP_VALUE = -0.7  # in residual norms, as on the embedded benchmark
_ATTACK_LR = {"full": 5e-4, "lora": 3e-3}
# Selection reads this many texts of each kind where the model may be a thousand times larger.
_PRETRAINED_TEXTS = 300


def run(options: argparse.Namespace) -> int:
    """Run the demonstration on `options.forget` and `options.retain` and print its table.

    Returns:
        0, or 1 if a part of it has failed.
    """
    calm_libraries()
    claim = run_directory(options.run_dir, overwrite=options.overwrite, resume=options.resume)
    with claim as run_dir, resumable():
        return _run(run_dir.resolve(), options, Console())


def _run(run_dir: Path, options: argparse.Namespace, console: Console) -> int:
    files = TextFiles(options.forget, options.retain)
    read_uses(files.forget, files.retain)  # bad input ends the run here
    facts: dict[str, Any] = {
        "files": {"forget": file_facts(files.forget), "retain": file_facts(files.retain)},
        "config": {
            "seeds": options.seeds,
            "epochs": options.epochs,
            "model": options.model and short_name(options.model),
            "sae": options.sae and short_name(options.sae),
        },
    }
    _check_inputs(run_dir / INPUTS_FILE, facts)
    subjects = [_subject(options, files, seed, console) for seed in options.seeds]
    with Workers(num_jobs(), run_dir) as workers:
        rounds = Rounds(run_dir, workers, console)
        rounds.run("guards", [subject.guards() for subject in subjects])
        ready = [subject for subject in subjects if subject.guards().is_finished(run_dir)]
        title = "attacks, continuation and evaluation"
        rounds.run(title, [cell for subject in ready for cell in subject.runs(run_dir).values()])
    outcomes = {subject.seed: _outcome(subject, run_dir) for subject in ready}
    write_results(run_dir, [row for subject in ready for row in _rows(subject, run_dir)])
    write_run_facts(run_dir, {**facts, "seeds": outcomes, "failures": rounds.failures})
    if ready:
        _write_first(ready[0], run_dir)
        report = build_report(run_dir)
        console.print(results_table(run_dir))
        for seed, outcome in outcomes.items():
            rouge = outcome["continuation"]
            if rouge and not rouge["measurable"]:
                console.print(
                    f"seed {seed}: verbatim continuation is not measurable: ROUGE-L "
                    f"{rouge['memorised']:.3f} of memorised passages is not twice that of unseen "
                    f"ones, {rouge['unseen']:.3f}.",
                    highlight=False,
                )
        console.print(f"report: {report}", highlight=False, soft_wrap=True)
    return rounds.print_failures()


def _check_inputs(path: Path, facts: dict[str, Any]) -> None:
    """Refuses to continue a run with other text or options.

    Raises:
        UserError: The interrupted run had others.
    """
    if path.is_file() and read_json(path) != facts:
        raise UserError(
            "--resume needs the files and options of the interrupted run, got others; repeat its "
            "command, or name another --run_dir."
        )
    write_atomically(path, json.dumps(facts, indent=1))


@dataclass(frozen=True)
class Subject:
    """One model of the user's text, and its runs.

    Attributes:
        seed: Of the runs.
        epochs: Of an attack; None where nobody knows what the model has memorised.
        model: Folder or hub name.
        model_label: How the results call it.
        guard: Place of the SAE, as in a configuration.
        data: Settings of `TextFilesData`.
        rounds: What was measured after each round of its training on this text.
    """

    seed: int
    epochs: int | None
    model: str
    model_label: str
    guard: dict[str, Any]
    data: dict[str, Any]
    rounds: tuple[dict[str, float], ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Passages that are asked about."""
        return ("unseen",) if self.epochs is None else ("memorised", "unseen")

    def guards(self) -> Cell:
        """Chooses the guards' settings and saves the guards."""
        guard = {**self.guard, "clamp_value": _CLAMP_VALUE, "clamp_unit": "residual_norm"}
        config = {
            "config": self._config("Evaluation", guard={**guard, "max_length": _MAX_LENGTH}),
            "grid": GRID,
            "draws": NUM_RANDOM_DRAWS,
            "parts": list(self.parts),
        }
        return Cell(f"seed_{self.seed}/guards", f"{_WORK}:tune_guards", config)

    def methods(self, run_dir: Path) -> list[str]:
        """The guards that could be made."""
        folders = self.guards().folder(run_dir).iterdir()
        return sorted(folder.name for folder in folders if folder.is_dir())

    def runs(self, run_dir: Path) -> dict[str, Cell]:
        """Attacks, verbatim continuation and evaluations, by their names."""
        runs = {}
        for attack in _ATTACK_LR if self.epochs is not None else ():
            for mode in ("test_time", "train_time"):
                runs[f"relearn_{attack}/{mode}"] = self._attack(attack, mode)
        after = [self.guards().digest]
        config = {
            "config": self._config("Evaluation"),
            "guards": {name: self.guards().path(name) for name in ("dsg", "static_clamp")},
        }
        name = f"seed_{self.seed}/continuation"
        runs["continuation"] = Cell(name, f"{_WORK}:continue_passages", config, after)
        for part in self.parts:
            for method in ("base", *self.methods(run_dir)):
                guard = None if method == "base" else self._saved(method)
                config = self._config("Evaluation", part, method=method, guard=guard)
                name = f"{part}/{method}"
                runs[name] = Cell(f"seed_{self.seed}/{name}", "test", config, after)
        return runs

    def _attack(self, attack: str, mode: str) -> Cell:
        config = self._config(
            "Relearning",
            guard=self._saved("dsg"),
            mode=mode,
            adapter=attack,
            lr=_ATTACK_LR[attack],
        )
        name = f"seed_{self.seed}/relearn_{attack}/{mode}"
        values = {
            "trainer.max_epochs": self.epochs,
            "trainer.num_sanity_val_steps": -1,
            "data.init_args.allow_overlap": True,
            "data.init_args.val_split": "test",
            **tracked(EXPERIMENT, name),
        }
        return Cell(name, "fit", changed(config, values), [self.guards().digest])

    def _saved(self, method: str) -> dict[str, Any]:
        return {**self.guard, "artifact": self.guards().path(method)}

    def _config(self, module: str, part: str = "memorised", **settings: Any) -> Config:
        labels = {"experiment": EXPERIMENT, "seed": self.seed, "model_label": self.model_label}
        config = {
            "seed_everything": self.seed,
            "trainer": {"accelerator": "cpu", "devices": 1},
            "model": {
                "class_path": f"lightning_modules.{module}Module",
                "init_args": {"model_name": self.model, **labels, **settings},
            },
            "data": {
                "class_path": "datamodules.TextFilesData",
                "init_args": {"model_name": self.model, "part": part, **self.data},
            },
        }
        return changed(config, quiet())


def _subject(options: argparse.Namespace, files: TextFiles, seed: int, console: Console) -> Subject:
    """The user's model and SAE, or new ones of the user's text."""
    data = {
        "forget_files": [str(path) for path in files.forget],
        "retain_files": [str(path) for path in files.retain],
        "seed": seed,
        "max_length": _MAX_LENGTH,
    }
    if options.model is not None:
        pretrained = open_pretrained(options.model, options.sae)
        return Subject(
            seed,
            None,
            options.model,
            short_name(options.model),
            vars(pretrained),
            {**data, "max_texts": _PRETRAINED_TEXTS},
        )
    title = f"seed {seed}: tokenizer, model and SAE"
    console.print(f"[bold]{title}[/bold] (cached after the first run)", highlight=False)
    folder = ensure_text_model(
        files, seed, SIZES, say=lambda line: console.print(f"  {line} ...", highlight=False)
    )
    return Subject(
        seed,
        options.epochs,
        str(folder / MODEL_FOLDER),
        "small",
        {"sae": str(folder / SAE_FOLDER), "hook_point": HOOK_POINT},
        data,
        tuple(read_training(folder)),
    )


def _rows(subject: Subject, run_dir: Path) -> list[dict[str, Any]]:
    """Result rows; the mean over the draws of random features stands for all of them."""
    drawn = [name for name in subject.methods(run_dir) if name.startswith("random_")]
    rows, of_draws = [], []
    for name, cell in subject.runs(run_dir).items():
        if cell.is_finished(run_dir):
            is_draw = name.rsplit("/", 1)[-1] in drawn
            (of_draws if is_draw else rows).extend(cell.rows(run_dir))
    return rows + mean_over_draws(of_draws, "random", len(drawn))


def _outcome(subject: Subject, run_dir: Path) -> dict[str, Any]:
    """Facts of a seed that are no result rows."""
    continuation = subject.runs(run_dir)["continuation"].outcome(run_dir)
    return {"continuation": continuation, "rouge_l_by_round": list(subject.rounds)}


def _write_first(subject: Subject, run_dir: Path) -> None:
    """Put what the report shows of the first seed beside the results."""
    tuned, runs = subject.guards().outcome(run_dir), subject.runs(run_dir)
    domains, threshold = {}, 0.0
    for part in subject.parts:
        cell = runs[f"{part}/dsg"]
        if cell.is_finished(run_dir):
            densities = densities_of(cell.folder(run_dir))
            threshold = densities.threshold
            domains |= {f"{name}, {part}": values for name, values in densities.domains.items()}
    write_drawn(
        run_dir,
        densities={"dsg": Densities(threshold, domains)},
        settings=[ChosenSettings(**tuned["settings"])],
        features=tuned["features"],
    )
