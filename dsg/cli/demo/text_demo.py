"""The demonstration on the user's own text: what can be measured without questions."""

import argparse
import functools
from pathlib import Path
from typing import Any

from rich.console import Console

from datamodules.text_files.files import file_facts, read_uses
from dsg.cli.demo.pretrained import open_pretrained
from dsg.cli.demo.stages import Stages
from dsg.cli.demo.text_continuation import continue_passages
from dsg.cli.demo.text_model import Sizes, TextFiles, ensure_text_model, read_training
from dsg.cli.demo.text_stages import Part, TextCell, evaluate, evaluate_random, relearn, tune_guards
from dsg.cli.demo.time_left import TimeLeft
from dsg.cli.demo.trainers import Tracking
from dsg.cli.interrupts import resumable
from dsg.cli.quiet import calm_libraries
from dsg.cli.tiny_world import HOOK_POINT, MODEL_FOLDER, SAE_FOLDER
from dsg.errors import UserError
from dsg.io import write_results, write_run_facts
from dsg.io.run_directory import run_directory
from dsg.lm import short_name
from dsg.report import (
    ChosenSettings,
    Densities,
    build_report,
    results_table,
    write_drawn,
)

SIZES = Sizes()
# Processor seconds of each stage on 100,000 words to forget and 300,000 to retain, with two rounds
# of training and five epochs of relearning.
USUAL_SECONDS = {
    "model": 600.0,
    "guards": 46.0,
    "memorised/base": 1.5,
    "memorised/dsg": 2.0,
    "memorised/static_clamp": 2.5,
    "memorised/random": 5.0,
    "unseen/base": 1.5,
    "unseen/dsg": 2.0,
    "unseen/static_clamp": 2.5,
    "unseen/random": 5.0,
    "continuation": 7.5,
    "relearn_full/test_time": 26.0,
    "relearn_full/train_time": 26.0,
    "relearn_lora/test_time": 31.0,
    "relearn_lora/train_time": 31.0,
}
_USUAL_EPOCHS = 5
_OF_PRETRAINED = ("guards", "unseen", "continuation")
# Selection reads this many texts of each kind where the model may be a thousand times larger.
PRETRAINED_TEXTS = 300


def run(options: argparse.Namespace) -> int:
    """Run the demonstration on `options.forget` and `options.retain` and print its table."""
    calm_libraries()
    claim = run_directory(options.run_dir, overwrite=options.overwrite, resume=options.resume)
    with claim as run_dir, resumable():
        _run(run_dir, options, Console())
    return 0


def _run(run_dir: Path, options: argparse.Namespace, console: Console) -> None:
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
    stages = Stages(run_dir, console, _time_left(options))
    known = stages.run("inputs", "files read", lambda _: facts)
    if known != facts:
        raise UserError(
            "--resume needs the files and options of the interrupted run, got others; repeat its "
            "command, or name another --run_dir."
        )
    outcomes = {}
    with Tracking(run_dir, facts) as tracking:
        for seed in options.seeds:
            cell = _cell(options, files, seed, tracking, stages)
            first = seed == options.seeds[0]
            outcomes[seed] = _one_seed(stages, cell, options, run_dir if first else None)
    write_results(run_dir, stages.rows)
    write_run_facts(run_dir, {**facts, "seeds": outcomes})
    report = build_report(run_dir)
    console.print(results_table(run_dir))
    for seed, outcome in outcomes.items():
        rouge = outcome["continuation"]
        if not rouge["measurable"]:
            console.print(
                f"seed {seed}: verbatim continuation is not measurable: ROUGE-L "
                f"{rouge['memorised']:.3f} of memorised passages is not twice that of unseen ones, "
                f"{rouge['unseen']:.3f}.",
                highlight=False,
            )
    console.print(f"report: {report}", highlight=False, soft_wrap=True)


def _time_left(options: argparse.Namespace) -> TimeLeft:
    usual: dict[str, float] = {}
    for name, seconds in USUAL_SECONDS.items():
        if name.startswith("relearn"):
            seconds *= options.epochs / _USUAL_EPOCHS
        if options.model is None or name.startswith(_OF_PRETRAINED):
            usual |= {f"seed_{seed}/{name}": seconds for seed in options.seeds}
    # How fast a pretrained model is shows only when it runs.
    return TimeLeft(usual, trusted=60.0 if options.model is None else 0.0)


def _cell(
    options: argparse.Namespace, files: TextFiles, seed: int, tracking: Tracking, stages: Stages
) -> TextCell:
    """The model and SAE of a seed: the user's, or new ones of the user's text."""
    if options.model is not None:
        found = open_pretrained(options.model, options.sae)
        return TextCell(
            files,
            seed,
            options.model,
            short_name(options.model),
            found.sae,
            found.sae_id,
            found.hook_point,
            tracking,
            trained=False,
            max_texts=PRETRAINED_TEXTS,
        )
    folder = stages.watch(
        f"seed_{seed}/model",
        f"seed {seed}: tokenizer, model and SAE (cached after the first run)",
        lambda: ensure_text_model(files, seed, SIZES, say=stages.say),
    )
    return TextCell(
        files,
        seed,
        str(folder / MODEL_FOLDER),
        "small",
        str(folder / SAE_FOLDER),
        None,
        HOOK_POINT,
        tracking,
        rounds=tuple(read_training(folder)),
    )


def _one_seed(
    stages: Stages, cell: TextCell, options: argparse.Namespace, report_dir: Path | None
) -> dict[str, Any]:
    """All stages of a seed; returns facts that are no result rows."""
    place, title = f"seed_{cell.seed}", f"seed {cell.seed}:"
    parts: tuple[Part, ...] = ("memorised", "unseen") if cell.trained else ("unseen",)
    tuned = stages.run(
        f"{place}/guards", f"{title} guards chosen", functools.partial(tune_guards, cell, parts)
    )
    guards = stages.folder(f"{place}/guards")
    densities: dict[str, list[float]] = {}
    threshold = 0.0
    for part in parts:
        for method in ("base", "dsg", "static_clamp"):
            found = stages.run(
                f"{place}/{part}/{method}",
                f"{title} {method} on {part} passages",
                functools.partial(evaluate, cell, method, part, guards),
            )
            if method == "dsg":
                threshold = found["threshold"]
                densities |= {f"{name}, {part}": of for name, of in found["domains"].items()}
        stages.run(
            f"{place}/{part}/random",
            f"{title} random features on {part} passages",
            functools.partial(evaluate_random, cell, part, guards),
        )
    continuation = stages.run(
        f"{place}/continuation",
        f"{title} verbatim continuation",
        functools.partial(continue_passages, cell, ("dsg", "static_clamp"), guards),
    )
    # There is nothing to relearn where nobody knows what the model has memorised.
    for attack in ("full", "lora") if cell.trained else ():
        for mode in ("test_time", "train_time"):
            stages.run(
                f"{place}/relearn_{attack}/{mode}",
                f"{title} relearning ({attack}), guard {mode.replace('_', ' ')}",
                functools.partial(relearn, cell, attack, mode, guards, options.epochs),
            )
    if report_dir is not None:
        write_drawn(
            report_dir,
            densities={"dsg": Densities(threshold, densities)},
            features=tuned["features"],
            settings=[ChosenSettings(**choice) for choice in tuned["chosen"]],
        )
    return {"continuation": continuation, "rouge_l_by_round": list(cell.rounds)}
