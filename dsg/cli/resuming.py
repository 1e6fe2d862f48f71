"""What every Lightning run gets so that it can be ended at any moment and continued."""

import signal
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from dsg.io import whole_file


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints that are whole, whatever becomes of the disk or the process."""

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        if "://" in str(path):  # object storage has its own way
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with whole_file(Path(path)) as file:
            torch.save(checkpoint, file)


def with_whole_checkpoints(plugins: Any) -> list[Any]:
    """The Trainer's option `plugins` with `WholeCheckpoints`, unless the user has another."""
    given = plugins if isinstance(plugins, list) else [plugins] if plugins else []
    if any(isinstance(plugin, CheckpointIO) for plugin in given):
        return given
    return [*given, WholeCheckpoints()]


class EndsAtSigterm(Callback):
    """Puts the caller's answer to SIGTERM back in the place of Lightning's.

    Lightning's ends the run after the current batch with the status of success, and talks to the
    other ranks meanwhile, which may never answer.
    """

    def __init__(self) -> None:
        self._handler = signal.getsignal(signal.SIGTERM)

    def _put_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del trainer, pl_module
        signal.signal(signal.SIGTERM, self._handler)

    on_sanity_check_start = _put_back
    on_train_start = _put_back
    on_validation_start = _put_back
    on_test_start = _put_back
    on_predict_start = _put_back


_KEY = "logged_rows"


class KeptRows(Logger):
    """Keeps every row that goes to the other loggers.

    Attributes:
        rows: Metrics of each row and its step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[dict[str, float], int | None]] = []

    @property
    def name(self) -> str | None:
        """It has none."""
        return None

    @property
    def version(self) -> str | None:
        """It has none."""
        return None

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep a row."""
        self.rows.append((dict(metrics), step))

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Ignore them."""


class RowsInCheckpoints(Callback):
    """Saves the rows with each checkpoint, and gives those of a resumed one to all loggers."""

    def __init__(self) -> None:
        self._in_epoch_end = False

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._in_epoch_end = False

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._in_epoch_end = True

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for kept in _kept(trainer):
            rows = kept.rows + self._about_to_be_logged(trainer)
            checkpoint[_KEY] = [[metrics, step] for metrics, step in rows]

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return  # an evaluation of the checkpoint logs rows of its own
        for logger in trainer.loggers:
            for metrics, step in checkpoint.get(_KEY, ()):
                logger.log_metrics(metrics, step)
            logger.save()

    def _about_to_be_logged(self, trainer: Trainer) -> list[tuple[dict[str, float], int | None]]:
        """Rows of the step or epoch that just ended: Lightning logs them after the checkpoint.

        It has no public way to ask for them, so let it log them to a list.
        """
        epoch_loop = trainer.fit_loop.epoch_loop
        progress = epoch_loop.batch_progress.current
        in_batch_end = progress.ready > progress.completed
        if not trainer.training or not (in_batch_end or self._in_epoch_end):
            return []
        listener, loggers = KeptRows(), trainer.loggers
        connector = trainer._logger_connector
        trainer.loggers = [listener]
        try:
            if in_batch_end:
                connector.update_train_step_metrics()
            else:
                epoch_loop._batches_that_stepped -= 1
                connector.log_metrics(connector.metrics["log"])
                epoch_loop._batches_that_stepped += 1
        finally:
            trainer.loggers = loggers
        return listener.rows


def _kept(trainer: Trainer) -> list[KeptRows]:
    return [logger for logger in trainer.loggers if isinstance(logger, KeptRows)]
