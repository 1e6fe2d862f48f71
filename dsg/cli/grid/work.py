"""What a worker of a grid does with a cell: a Lightning run, or the tuning of guards."""

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

# A worker imports these once, and not in each of its cells.
import datamodules  # noqa: F401
import lightning_modules  # noqa: F401
from datamodules.parts.loading import question_loader
from dsg.cli import lightning_cli
from dsg.cli.config_errors import one_sentence
from dsg.cli.configs import Config, map_strings
from dsg.cli.grid.cells import RUN_DIR, Cell, named_function
from dsg.cli.grid.file import GUARD_KEY
from dsg.cli.grid.tuning import GuardTuner, Try, best
from dsg.cli.process import calm_libraries
from dsg.errors import UserError
from dsg.guard import Guard
from dsg.io import write_atomically
from dsg.lm import load_model
from dsg.sae import load_sae
from dsg.selection import Selection, describe_features, guard_texts
from lightning_modules.parts.guards import maker_from

CONFIGS_FOLDER = "configs"
NUM_DESCRIBED = 8  # features
NUM_READ = 200  # forget texts in which they are looked for


def work(cell: Cell, run_dir: Path) -> Any:
    """Do a cell in its folder; returns what it finds beside its files.

    Args:
        cell: What to do.
        run_dir: Directory of the grid; the configuration of every run lies in its `configs/`, ready
            to be run by hand.

    Raises:
        UserError: The configuration is wrong, or the run finds its input wrong.
    """
    config = map_strings(cell.config, lambda text: text.replace(RUN_DIR, str(run_dir)))
    if cell.command not in lightning_cli.RunCLI.subcommands():
        calm_libraries()
        do = named_function(cell.command)
        return do(cell.folder(run_dir), config, run_dir / CONFIGS_FOLDER / cell.name)
    path = write_config(run_dir / CONFIGS_FOLDER / f"{cell.name}.yaml", config)
    lightning_cli.run([cell.command, "-c", str(path), "--run_dir", str(cell.folder(run_dir))])
    return None


def write_config(path: Path, config: Mapping[str, Any]) -> Path:
    """Write a configuration as YAML."""
    return write_atomically(path, yaml.safe_dump(dict(config), sort_keys=False))


def instantiate(path: Path) -> tuple[Any, Any]:
    """The module and the data module of a configuration; nothing is loaded and nothing runs.

    Raises:
        UserError: The configuration is wrong.
    """
    try:
        with ExitStack() as stack:
            cli = lightning_cli.RunCLI(
                stack, ["-c", str(path)], run=False, parser_kwargs={"exit_on_error": False}
            )
    except argparse.ArgumentError as error:
        raise UserError(one_sentence(str(error), "mend the grid")) from None
    return cli.model, cli.datamodule


def tune_guards(folder: Path, config: Config, configs: Path) -> dict[str, Any]:
    """Choose the settings of all guards of one seed and domain, and save the guards.

    They share the model's activations on the texts, so one cell does them all; calibration texts
    are each one's own. How long each took counts the shared part in full, but neither loading nor
    choosing. The features of the first guard are described.

    Args:
        folder: Gets a folder per method with its guard.
        config: Method -> `config`, `grid` and `settings_of`.
        configs: Where the configurations are written.

    Returns:
        `guards`: method -> `tries`, `chosen` and `seconds`; and the described `features`.
    """
    modules = {}
    for name, method in config.items():
        resolved = map_strings(method["config"], lightning_cli.resolve_benchmark)
        modules[name] = instantiate(write_config(configs / f"{name}.yaml", resolved))
    first, data = next(iter(modules.values()))
    settings = {name: module.guard_settings for name, (module, _) in modules.items()}
    data.setup("validate")
    texts = guard_texts(data, near=False)
    model, sae = load_model(first.model_name), load_sae(first.guard_settings.sae)
    started = time.perf_counter()
    maker = maker_from(first.guard_settings, model, sae, data)
    forget = maker.statistics(texts["forget_selection"])
    shared = time.perf_counter() - started
    tuner = GuardTuner(maker, forget, *_questions(data))
    outcomes: dict[str, Any] = {}
    features: list[dict[str, Any]] = []
    for name in sorted(config, key=lambda name: config[name]["settings_of"] is not None):
        method, own = config[name], data
        if method["config"].get("data") != next(iter(config.values()))["config"].get("data"):
            own = modules[name][1]
            own.setup("validate")
        maker.calibration_texts = own.calibration_texts(near=settings[name].method == "dsg_near")
        tries: list[Try] = []
        chosen: dict[str, Any] = {}
        if method["settings_of"] is not None:
            chosen = outcomes[method["settings_of"]]["chosen"]
        elif method["grid"]:
            grid = {_setting(key): values for key, values in method["grid"].items()}
            tries = tuner.tries(settings[name], grid)
            chosen = best(tries).settings
        started = time.perf_counter()
        guard = tuner.make(replace(settings[name], **chosen))
        guard.save(folder / name)
        seconds = shared + time.perf_counter() - started
        outcomes[name] = {"tries": tries, "chosen": chosen, "seconds": round(seconds, 2)}
        if name == next(iter(config)):
            features = describe_strongest(guard, model, data, sae, texts["forget_selection"])
    return {"guards": outcomes, "features": features}


def describe_strongest(
    guard: Guard, model: Any, data: Any, sae: Any, texts: Sequence[str]
) -> list[dict[str, Any]]:
    """What a guard's first features respond to in forget texts, for the report."""
    selection = guard.facts["selection"]
    strongest = Selection(**{key: values[:NUM_DESCRIBED] for key, values in selection.items()})
    return describe_features(
        model, data.tokenizer, sae, strongest, texts[:NUM_READ], hook_point=guard.hook_point
    )


def _questions(data: Any) -> tuple[list[Any], list[Any]]:
    """Validation questions that decide the choice, renumbered, and their batches."""
    chosen = [q for q in data.questions("validation") if q.domain in ("forget", "retain")]
    questions = [replace(question, id=id) for id, question in enumerate(chosen)]
    return questions, list(question_loader(data.tokenizer, questions, data.batch_size, None))


def _setting(key: str) -> str:
    return key.removeprefix(f"{GUARD_KEY}.")
