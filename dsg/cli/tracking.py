"""Weights & Biases beside the files of a run, which must be complete without it."""

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, WandbLogger

from dsg.results import RESULTS_FILE, read_results

_log = logging.getLogger(__name__)

SUMMARY_KEY = "summary"
_SUMMARY_COLUMNS = (
    *("method", "guard", "mode", "attack", "epoch", "request", "domain", "protocol"),
    *("metric", "value", "n", "low", "high"),
)
_SUMMARY_METRICS = ("accuracy", "alignment", "perplexity", "trigger_rate", "density_auroc")


class Unfailing(Logger):
    """A logger that falls silent at its first error instead of ending the run.

    Args:
        inner: The logger to be tried.
    """

    def __init__(self, inner: Logger) -> None:
        super().__init__()
        self._inner = inner
        self._failed = False

    @property
    def experiment(self) -> Any:
        """The inner logger's; None after an error."""
        return self._try(lambda: getattr(self._inner, "experiment", None))

    @property
    def name(self) -> str | None:
        """The inner logger's."""
        return self._try(lambda: self._inner.name)

    @property
    def version(self) -> int | str | None:
        """The inner logger's."""
        return self._try(lambda: self._inner.version)

    @property
    def save_dir(self) -> str | None:
        """The inner logger's."""
        return self._try(lambda: self._inner.save_dir)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Pass on."""
        self._try(lambda: self._inner.log_metrics(metrics, step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Pass on."""
        self._try(lambda: self._inner.log_hyperparams(params, *args, **kwargs))

    def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
        """Pass on, to a logger that knows tables."""
        if isinstance(self._inner, WandbLogger):
            inner = self._inner
            self._try(lambda: inner.log_table(key, columns=columns, data=data))

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Pass on."""
        self._try(lambda: self._inner.after_save_checkpoint(checkpoint_callback))

    def save(self) -> None:
        """Pass on."""
        self._try(self._inner.save)

    def finalize(self, status: str) -> None:
        """Pass on."""
        self._try(lambda: self._inner.finalize(status))

    def _try(self, action: Callable[[], Any]) -> Any:
        if self._failed:
            return None
        try:
            return action()
        except Exception as error:  # whatever a tracker does, the run goes on without it
            self._failed = True
            report_failure(error)
            return None


def unfailing(loggers: Any) -> Any:
    """The Trainer's option `logger` with W&B as a logger that cannot end the run."""
    if isinstance(loggers, list):
        return [unfailing(logger) for logger in loggers]
    return Unfailing(loggers) if isinstance(loggers, WandbLogger) else loggers


def report_failure(reason: object) -> None:
    """Say that the run is not tracked."""
    _log.warning("W&B does not work (%s); results.jsonl and metrics.csv hold all.", reason)


def log_summary(trainer: Trainer, run_dir: Path) -> None:
    """Log the results of the first and the last epoch as one table.

    Args:
        trainer: Whose loggers get it.
        run_dir: Holds the results; nothing is logged if there are none.
    """
    if not (run_dir / RESULTS_FILE).is_file():
        return
    rows = [row for row in read_results(run_dir) if row["metric"] in _SUMMARY_METRICS]
    epochs = [row["epoch"] for row in rows if row["epoch"] is not None]
    ends = {None, *((min(epochs), max(epochs)) if epochs else ())}
    cells = [[row[name] for name in _SUMMARY_COLUMNS] for row in rows if row["epoch"] in ends]
    for logger in trainer.loggers:
        if isinstance(logger, Unfailing):
            logger.log_table(SUMMARY_KEY, columns=list(_SUMMARY_COLUMNS), data=cells)


def data_facts(trainer: Trainer) -> dict[str, Any]:
    """What the data module tells of its texts, where it does."""
    facts = getattr(getattr(trainer, "datamodule", None), "facts", None)
    return {} if facts is None else {"data": facts()}


def place_loggers(loggers: Any, run_dir: Path, experiment: str | None) -> Any:
    """Make the configured loggers write into a run directory.

    Args:
        loggers: The Trainer's option `logger`.
        run_dir: Absolute path.
        experiment: Group of the W&B run, unless it is configured.

    Returns:
        The option; W&B is left out where it is not installed.
    """
    if not isinstance(loggers, list):
        return next(iter(place_loggers([loggers], run_dir, experiment)), False)
    kept = []
    for logger in loggers:
        options = logger.get("init_args") if isinstance(logger, Namespace) else None
        if options is not None and logger.class_path.endswith(".WandbLogger"):
            if not importlib.util.find_spec("wandb"):
                report_failure("it is not installed")
                continue
            options.name = options.get("name") or run_dir.name
            options.group = options.get("group") or experiment
        if options is not None and "save_dir" in options:
            options.save_dir = str(run_dir)
            if logger.class_path.endswith(".CSVLogger"):
                options.name = options.version = ""  # metrics.csv lies in the run directory itself
        kept.append(logger)
    return kept
