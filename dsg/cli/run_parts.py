"""What every Lightning run gets so that it can be ended at any moment and continued."""

import signal
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import CheckpointIO
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
