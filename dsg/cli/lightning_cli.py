"""`dsg fit|validate|test|predict`: LightningCLI in subclass mode, inside one run directory."""

import argparse
import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from rich.console import Console
from typing_extensions import override

from dsg.cli.config_errors import one_line, one_sentence, user_error_behind
from dsg.cli.config_files import check_config_files, with_shared
from dsg.cli.configs import map_strings, resolve_benchmark
from dsg.cli.early_checks import check_inputs, check_strategy, trainer_refusals
from dsg.cli.process import calm_libraries, disk_full_behind, interrupts_raised
from dsg.cli.resuming import EndsAtSigterm, KeptRows, RowsInCheckpoints, with_whole_checkpoints
from dsg.cli.tracking import (
    Unfailing,
    data_facts,
    log_summary,
    offline_runs,
    place_loggers,
    tracked_facts,
    unfailing,
)
from dsg.errors import UserError, check_seeds
from dsg.io import FOLDER as JOURNAL_FOLDER
from dsg.io import (
    ITEMS_FILE,
    RESULTS_FILE,
    is_rank_zero,
    newest_checkpoint,
    read_checkpoint,
    read_results,
    read_run_facts,
    remove_drafts,
    write_run_facts,
)
from dsg.io.run_directory import run_directory
from dsg.report import outcome_table

CONFIG_FILE = "config.yaml"
# Defaults of every run; a configuration names only what differs. Loggers write into the run
# directory; W&B stays offline unless the user sets WANDB_MODE=online.
TRAINER_DEFAULTS: dict[str, Any] = {
    "logger": [
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "."}},
        {
            "class_path": "lightning.pytorch.loggers.WandbLogger",
            "init_args": {"project": "dynamic-sae-guardrails"},
        },
    ],
    # Data modules deal whole global batches to ranks; Lightning's sampler would repeat samples.
    "use_distributed_sampler": False,
    # A metric over all samples of a split has no value for the first two batches.
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}
# Values of --ckpt_path that Lightning looks up itself.
_NAMED_CHECKPOINTS = (None, "best", "last", "hpc")


def run(argv: Sequence[str]) -> int:
    """Parse a command line, claim its run directory and run the Trainer.

    Args:
        argv: `fit`, `validate`, `test` or `predict` and its options.

    Returns:
        The exit status, 0.

    Raises:
        UserError: The configuration is wrong, the run directory cannot be used, or the run itself
            finds its input wrong.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the message tells how to continue.
    """
    calm_libraries()
    check_config_files(argv)
    parser_kwargs = {name: {"exit_on_error": False} for name in RunCLI.subcommands()}
    parser_kwargs |= {"prog": "dsg", "exit_on_error": False}
    with ExitStack() as stack, interrupts_raised():
        try:
            cli = RunCLI(stack, list(argv), parser_kwargs=parser_kwargs)
        except argparse.ArgumentError as error:
            raise UserError(one_sentence(str(error), f"see dsg {argv[0]} --help")) from None
        except MisconfigurationException as error:
            raise UserError(str(error)) from error
        except RuntimeError as error:
            if "in loading state_dict for" not in str(error):
                raise
            raise UserError(
                f"the checkpoint must be of this run, got one with other weights "
                f"({one_line(error)}); give the same configuration or start again with --overwrite."
            ) from None
        except ValueError as error:
            refusal = user_error_behind(error)
            if refusal is None:
                raise
            raise refusal from None
    if is_rank_zero():
        print_outcome(cli.run_dir)
    return 0


class SaveRunConfig(SaveConfigCallback):
    """Writes the configuration as the user gave it, and hands it to Weights & Biases."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, declared: Namespace):
        # Not into the loggers' directories: with several loggers those differ.
        super().__init__(parser, config, save_to_log_dir=False)
        self._declared = declared

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        text = self.parser.dump(self._declared, skip_unset=False)
        (Path(trainer.default_root_dir) / CONFIG_FILE).write_text(text, encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, Unfailing):
                facts = {"config": yaml.safe_load(text), **data_facts(trainer)}
                logger.log_hyperparams(facts)


class RunCLI(LightningCLI):
    """LightningCLI whose runs each own a directory.

    Args:
        stack: Holds the claim on the run directory and ends it when the run is over.
        arguments: The command line after `dsg`.
        **kwargs: Further arguments of `LightningCLI`.
    """

    def __init__(self, stack: ExitStack, arguments: list[str], **kwargs: Any) -> None:
        self._stack = stack
        self._arguments = arguments
        self._started = time.time()
        self._replaces: list[Path] | None = None
        super().__init__(
            args=with_shared(arguments),
            save_config_callback=SaveRunConfig,
            trainer_defaults=TRAINER_DEFAULTS
            | {"callbacks": [RowsInCheckpoints(), EndsAtSigterm()]},
            seed_everything_default=0,
            **kwargs,
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Directory of this run; by default runs/<names of the configurations>, which is "
            "evaluate_dsg for configs/evaluate/dsg.yaml.",
        )
        parser.add_argument(
            "--overwrite", action="store_true", help="Replace an earlier run in run_dir."
        )
        parser.add_argument(
            "--resume",
            action="store_true",
            help="Continue an earlier run in run_dir, fit from its newest checkpoint.",
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # The inherited method warns whenever arguments are passed on, as the dispatcher does.
        self.config = parser.parse_args(args)
        seed = self.config.get(self.config.get("subcommand"), self.config).get("seed_everything")
        if not isinstance(seed, bool):
            check_seeds("seed_everything", [seed])

    @override
    def _parse_ckpt_path(self) -> None:
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        if path not in _NAMED_CHECKPOINTS:
            read_checkpoint(Path(path))  # bad input ends the run here
        super()._parse_ckpt_path()

    @override
    def before_instantiate_classes(self) -> None:
        if self.subcommand is None:  # only parsing and instantiating: nothing runs or is saved
            self.save_config_callback = None
            return
        config = self.config[self.subcommand]
        check_strategy(config.trainer.strategy)
        paths = [Path(str(path)) for path in config.config or [self.subcommand]]
        self.run_dir = Path(config.run_dir or f"runs/{run_name(*paths)}")
        claim = run_directory(self.run_dir, overwrite=config.overwrite, resume=config.resume)
        self._stack.enter_context(claim)
        self._stack.push(self._finish)

        # What is saved must not depend on this machine's cache, nor overwrite when run again.
        declared = config.clone()
        declared.update(Namespace(run_dir=str(self.run_dir), overwrite=False, resume=False))
        self.save_config_kwargs = {"declared": declared}
        self._declared = declared

        if config.resume:
            self._continue(config)
        # Absolute, because W&B's own process may have been started in another working directory.
        config.trainer.default_root_dir = str(self.run_dir.absolute())
        run_dir, facts = self.run_dir.absolute(), tracked_facts(self.subcommand, config)
        self._replaces = offline_runs(run_dir) if config.resume else None
        config.trainer.logger = place_loggers(
            config.trainer.logger, run_dir, facts, resume=config.resume
        )
        self.config[self.subcommand] = map_strings(config, resolve_benchmark)

    @override
    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if self.subcommand is not None:
            check_inputs(self.model, self.datamodule)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        configured = self._get(self.config_init, "trainer", default={})
        loggers = unfailing(configured.get("logger"), self._replaces)
        if loggers:
            loggers = [*(loggers if isinstance(loggers, list) else [loggers]), KeptRows()]
        plugins = with_whole_checkpoints(configured.get("plugins"))
        with trainer_refusals():
            return super().instantiate_trainer(logger=loggers, plugins=plugins, **kwargs)

    def _continue(self, config: Namespace) -> None:
        if is_rank_zero():
            remove_drafts(self.run_dir)
        if self.subcommand != "fit" or config.ckpt_path is not None:
            return
        checkpoint = newest_checkpoint(self.run_dir)
        if checkpoint is None:
            raise UserError(
                f"--resume needs a checkpoint that can be read, and run_dir "
                f"{str(self.run_dir)!r} holds none; use --overwrite to start that run again."
            )
        config.ckpt_path = str(checkpoint)

    def _finish(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        """Whatever happened, leave no process and no open file; on success write the facts."""
        trainer = getattr(self, "trainer", None)
        if isinstance(error, KeyboardInterrupt):
            error.args = (self._how_to_continue(),)
        elif error is not None and disk_full_behind(error):
            error.add_note(self._how_to_continue())
        if error is not None and trainer is not None and trainer.strategy.launcher is not None:
            # Ranks that wait for this one would hang, or die with a traceback of their own.
            trainer.strategy.launcher.kill(signal.SIGKILL)
        if error is None and is_rank_zero():
            log_summary(self.trainer, self.run_dir)
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            with contextlib.suppress(Exception):  # the run's own files are complete
                wandb.finish(exit_code=0 if error is None else 1)
        if error is None and is_rank_zero():
            self._write_facts()

    def _how_to_continue(self) -> str:
        # A question filter and predictions keep what they have found on disk.
        resumable = any((self.run_dir / JOURNAL_FOLDER).glob("*.jsonl")) or (
            self.subcommand == "fit" and newest_checkpoint(self.run_dir) is not None
        )
        words = [word for word in self._arguments if word not in ("--overwrite", "--resume")]
        option = "--resume" if resumable else "--overwrite"
        verb = "continue" if resumable else "start again"
        return f"{verb} with: {shlex.join(['dsg', *words, option])}"

    def _write_facts(self) -> None:
        text = self._parser(self.subcommand).dump(self._declared, skip_unset=False)
        facts = {
            "command": ["dsg", *self._arguments],
            "config": yaml.safe_load(text),
            "started": datetime.fromtimestamp(self._started, UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self._started, 1),
            "world_size": self.trainer.world_size,
            **data_facts(self.trainer),
        }
        # A module may have noted facts of its own, such as hashes of its data.
        write_run_facts(self.run_dir, {**read_run_facts(self.run_dir), **facts})


def run_name(first: Path, *others: Path) -> str:
    """Name of a run: the first configuration's path below `configs/`, and the others' file names.

    Outside of `configs/` the first one's file name stands alone as well.
    """
    parts = first.with_suffix("").parts
    below = parts[::-1].index("configs") if "configs" in parts else 1
    return "_".join([*parts[len(parts) - below :], *(path.stem for path in others)])


# What a run may leave, and what it is for; in this order.
_FILES = {
    RESULTS_FILE: "every measurement",
    ITEMS_FILE: "the values of each item, for dsg compare",
    "predictions.jsonl": "a row per text",
    "questions.json": "the questions that are kept, for `keep` of the data",
    "sweep.csv": "threshold and error rates for every number of features",
    "guard": "the guard, for `artifact`",
    "guards": "the guards",
    "model": "the model, for `model_name`",
    "answers_off.jsonl": "the answers with the guard off",
    "answers_on.jsonl": "the answers with the guard on",
    "metrics.csv": "what was logged on the way",
}


def print_outcome(run_dir: Path) -> None:
    """Print the table of a finished run and the paths of what it has left."""
    console = Console()
    has_results = (run_dir / RESULTS_FILE).is_file()
    if has_results:
        table, num_more = outcome_table(read_results(run_dir))
        if table is not None:
            console.print(table)
        if num_more:
            console.print(f"and {num_more} more measurements in {RESULTS_FILE}\n", highlight=False)
    left = {name: use for name, use in _FILES.items() if (run_dir / name).exists()}
    width = max((len(str(run_dir / name)) for name in left), default=0)
    for name, use in left.items():
        path = str(run_dir / name)
        console.print(f"{path:<{width}}  {use}", highlight=False, markup=False, soft_wrap=True)
    if has_results:
        page = f"dsg report {run_dir}"
        console.print(f"{page:<{width}}  makes a page of it", highlight=False, soft_wrap=True)
