"""The whole loop on the embedded benchmark: methods side by side, attacks, sequential requests.

Every run here is one of the Lightning runs that `configs/` describes; settings are chosen on the
validation half of the facts and every reported number is measured on the test half.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from dsg.cli.demo.draws import mean_over_draws
from dsg.cli.demo.stages import Stages
from dsg.cli.demo.trainers import Tracking
from dsg.cli.demo.world_stages import (
    FROM_DOCUMENTS,
    Cell,
    Context,
    evaluate,
    relearn,
    sequence,
    tune_guards,
    tune_rmu,
)
from dsg.cli.grid.tuning import NUM_RANDOM_DRAWS
from dsg.cli.interrupts import resumable
from dsg.cli.quiet import calm_libraries
from dsg.cli.tiny_world import ensure_tiny_world
from dsg.guard import RECIPES
from dsg.io import write_results, write_run_facts
from dsg.io.run_directory import run_directory
from dsg.report import (
    ChosenSettings,
    Densities,
    build_report,
    results_table,
    write_drawn,
)

METHODS = ("base", *(method for method in RECIPES if method != "random"), FROM_DOCUMENTS, "rmu")
ATTACKS: tuple[Literal["full", "lora"], ...] = ("full", "lora")
ATTACKED: tuple[tuple[str, Literal["none", "test_time", "train_time"]], ...] = (
    ("dsg", "test_time"),
    ("dsg", "train_time"),
    ("rmu", "none"),
)


def run(options: argparse.Namespace) -> int:
    """Run the demonstration and print its table."""
    calm_libraries()
    console = Console()
    claim = run_directory(options.run_dir, overwrite=options.overwrite, resume=options.resume)
    with claim as run_dir, resumable():
        _run(run_dir.resolve(), options, console)
    return 0


def _run(run_dir: Path, options: argparse.Namespace, console: Console) -> None:
    stages = Stages(run_dir, console)
    config = {
        "seeds": options.seeds,
        "forget_domains": options.forget_domains,
        "parts": options.parts,
        "epochs": options.epochs,
    }
    chosen: list[ChosenSettings] = []
    with Tracking(run_dir, config) as tracking:
        for seed in options.seeds:
            console.print(
                f"[bold]seed {seed}: tokenizer, model and SAE[/bold] (cached after the first run)"
            )
            benchmark = ensure_tiny_world(seed)
            choices: list[ChosenSettings] = []
            for forget_domain in options.forget_domains:
                context = Context(Cell(benchmark, seed, forget_domain), tracking)
                found = _forget_one_domain(stages, context, options, None if chosen else run_dir)
                chosen, choices = chosen or found, choices or found
            if "sequential" in options.parts:
                context = Context(Cell(benchmark, seed, options.forget_domains[0]), tracking)
                _sequential(
                    stages, context, {choice.method: dict(choice.chosen) for choice in choices}
                )
    write_results(run_dir, stages.rows)
    write_drawn(run_dir, settings=chosen)
    write_run_facts(run_dir, {"command": ["dsg", *sys.argv[1:]], "config": config})
    report = build_report(run_dir)
    console.print(results_table(run_dir))
    console.print(f"report: {report}", highlight=False, soft_wrap=True)


def _forget_one_domain(
    stages: Stages, context: Context, options: argparse.Namespace, report_dir: Path | None
) -> list[ChosenSettings]:
    """Everything about one seed and forget domain; returns how the settings were chosen."""
    cell = context.cell
    place = f"seed_{cell.seed}/{cell.forget_domain}"
    title = f"seed {cell.seed}, {cell.forget_domain}:"
    tuned = stages.run(
        f"{place}/guards", f"{title} guards chosen", functools.partial(tune_guards, context)
    )
    guards = stages.folder(f"{place}/guards")
    rmu = stages.run(f"{place}/rmu", f"{title} RMU chosen", functools.partial(tune_rmu, context))
    rmu_model = stages.folder(f"{place}/rmu") / "model"
    if "evaluate" in options.parts:
        for method in METHODS:
            found = stages.run(
                f"{place}/evaluate/{method}",
                f"{title} {method} on test facts",
                functools.partial(evaluate, context, method, guards, rmu_model),
            )
            if method == "dsg" and report_dir is not None:
                write_drawn(report_dir, densities={"dsg": Densities(**found)})
        _random_control(stages, context, guards, place, title)
    if "relearn" in options.parts:
        for attack in ATTACKS:
            for method, mode in ATTACKED:
                name = f"{method}_{mode}" if method == "dsg" else method
                stages.run(
                    f"{place}/relearn_{attack}/{name}/{options.epochs}_epochs",
                    f"{title} relearning ({attack}) against {name.replace('_', ' ')}",
                    functools.partial(
                        relearn, context, attack, method, mode, guards, rmu_model, options.epochs
                    ),
                )
        _attacked_base(stages)
    if report_dir is not None:
        write_drawn(report_dir, features=tuned["features"])
    return [ChosenSettings(**found) for found in [*tuned["chosen"], rmu["chosen"]]]


def _random_control(stages: Stages, context: Context, guards: Path, place: str, title: str) -> None:
    """Evaluate all draws; their mean, with an interval over the draws, is the method's row."""
    others, stages.rows = stages.rows, []
    for draw in range(NUM_RANDOM_DRAWS):
        stages.run(
            f"{place}/evaluate/random_{draw}",
            f"{title} random features, draw {draw + 1} of {NUM_RANDOM_DRAWS}",
            functools.partial(evaluate, context, f"random_{draw}", guards, None),
        )
    stages.rows = [*others, *mean_over_draws(stages.rows)]


def _attacked_base(stages: Stages) -> None:
    """The test-time attack never sees the guard: with the guard off it is the base model's."""
    base = {"method": "base", "mode": None, "guard": "none"}
    stages.rows += [
        {**row, **base}
        for row in stages.rows
        if row["attack"] and row["mode"] == "test_time" and row["guard"] == "off"
    ]


def _sequential(stages: Stages, context: Context, settings: dict[str, dict[str, Any]]) -> None:
    seed = context.cell.seed
    for method in ("dsg", "rmu"):
        stages.run(
            f"seed_{seed}/sequential/{method}",
            f"seed {seed}: three requests in sequence, {method}",
            functools.partial(sequence, context, method, settings[method]),
        )
