"""Weights & Biases beside the files of a run, which must be complete without it."""

import importlib.util
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, WandbLogger

from dsg.evaluation import COMPARED
from dsg.io import RESULTS_FILE, read_results

_log = logging.getLogger(__name__)

SUMMARY_KEY = "summary"
_SUMMARY_COLUMNS = (
    *("method", "guard", "mode", "attack", "epoch", "request", "domain", "protocol"),
    *("metric", "value", "n", "low", "high"),
)


class Unfailing(Logger):
    """A logger that falls silent at its first error instead of ending the run.

    A run that goes on logs everything again (see `dsg.cli.resuming`): offline that replaces what
    lies in the run directory, online what is there already is left out. Metrics of evaluations get
    the epoch as their axis.

    Args:
        inner: The logger to be tried.
        replaces: Folders of the same offline run as it was before; None for a new run.
    """

    def __init__(self, inner: Logger, replaces: Sequence[Path] | None = None) -> None:
        super().__init__()
        self._inner = inner
        self._failed = False
        self._replaces = replaces
        self._num_known = 0
        self._on_epochs: set[str] = set()

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
        """Pass on what is new."""
        self._try(lambda: self._log(metrics, step))

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

    @rank_zero_only
    def _log(self, metrics: dict[str, float], step: int | None) -> None:
        if self._replaces is not None:
            self._num_known = self.experiment.step
            remove_folders(self._replaces)
            self._replaces = None
        if self._num_known > 0:
            self._num_known -= 1
            return
        if "epoch" in metrics:
            self._define({name for name in metrics if name.startswith("val/")})
        self._inner.log_metrics(metrics, step)

    def _define(self, names: set[str]) -> None:
        for name in sorted(names - self._on_epochs):
            self.experiment.define_metric(name, step_metric="epoch")
        self._on_epochs |= names

    def _try(self, action: Callable[[], Any]) -> Any:
        if self._failed:
            return None
        try:
            return action()
        except Exception as error:  # whatever a tracker does, the run goes on without it
            self._failed = True
            report_failure(error)
            return None


def unfailing(loggers: Any, replaces: Sequence[Path] | None = None) -> Any:
    """The Trainer's option `logger` with W&B as a logger that cannot end the run.

    Args:
        loggers: The option.
        replaces: See `Unfailing`.
    """
    if isinstance(loggers, list):
        return [unfailing(logger, replaces) for logger in loggers]
    if isinstance(loggers, WandbLogger):
        return Unfailing(loggers, replaces=replaces)
    return loggers


def offline_runs(run_dir: Path) -> list[Path]:
    """Folders of W&B's offline runs in a run directory, the oldest first."""
    return sorted((run_dir / "wandb").glob("offline-run-*-*"))


def earlier_id(run_dir: Path) -> str | None:
    """Id of the W&B run that lies in a run directory, online or offline; it ends their names."""
    folders = [*offline_runs(run_dir), *(run_dir / "wandb").glob("run-*-*")]
    return folders[0].name.rsplit("-", 1)[1] if folders else None


def remove_folders(folders: Sequence[Path]) -> None:
    """Remove them; those that are gone are no mistake."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


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
    compared = {column.metric for column in COMPARED}
    rows = [row for row in read_results(run_dir) if row["metric"] in compared]
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


def place_loggers(
    loggers: Any, run_dir: Path, facts: Mapping[str, Any], *, resume: bool = False
) -> Any:
    """Make the configured loggers write into a run directory.

    Args:
        loggers: The Trainer's option `logger`.
        run_dir: Absolute path.
        facts: `group`, `job_type` and `tags` of the W&B run, unless they are configured.
        resume: Whether to go on with the W&B run that lies there.

    Returns:
        The option; W&B is left out where it is not installed.
    """
    if not isinstance(loggers, list):
        return next(iter(place_loggers([loggers], run_dir, facts, resume=resume)), False)
    kept = []
    for logger in loggers:
        options = logger.get("init_args") if isinstance(logger, Namespace) else None
        if options is not None and logger.class_path.endswith(".WandbLogger"):
            if not importlib.util.find_spec("wandb"):
                report_failure("it is not installed")
                continue
            options.name = options.get("name") or run_dir.name
            options.id = options.get("id") or (earlier_id(run_dir) if resume else None)
            for name, value in facts.items():
                options[name] = options.get(name) or value
        if options is not None and "save_dir" in options:
            options.save_dir = str(run_dir)
            if logger.class_path.endswith(".CSVLogger"):
                options.name = options.version = ""  # metrics.csv lies in the run directory itself
        kept.append(logger)
    return kept


def tracked_facts(command: str, config: Namespace) -> dict[str, Any]:
    """How a run is filed in W&B: with its experiment, by its kind, and under what it uses.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        config: The command's configuration.
    """
    model, data = (config.get(name) or Namespace() for name in ("model", "data"))
    settings = model.get("init_args") or Namespace()
    kind = _class_name(model).removesuffix("Module")
    method = settings.get("objective") or settings.get("attacker") or Namespace()
    used = (command, _class_name(method), _class_name(data).removesuffix("Data"))
    return {
        "group": settings.get("experiment"),
        "job_type": re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind).lower() or command,
        "tags": [name for name in used if name],
    }


def _class_name(part: Any) -> str:
    return str(part.get("class_path") or "").rpartition(".")[2]
