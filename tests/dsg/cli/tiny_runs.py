"""Modules of a few numbers that the command line's tests run by class path."""

import errno
import os
import signal
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from dsg.errors import UserError
from dsg.io.atomic import write_atomically


class TinyModule(LightningModule):
    """Fits one weight; `model_folder` stands for a model that a real module would load."""

    def __init__(self, lr: float = 0.1, model_folder: str | None = None):
        super().__init__()
        self.lr = lr
        self.model_folder = model_folder
        self.linear = torch.nn.Linear(1, 1)

    def training_step(self, batch: Tensor) -> Tensor:
        loss = self.linear(batch).pow(2).mean()
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def test_step(self, batch: Tensor) -> None:
        self.log("test/forget/guard_on/accuracy", batch.mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class RefusingModule(TinyModule):
    """Finds its input wrong only when the run has begun."""

    def configure_model(self) -> None:
        raise UserError("The SAE has d_in 8, the model 16; give a matching SAE.")


class InterruptedModule(TinyModule):
    """Gets a signal in its third epoch, Ctrl-C by default."""

    def __init__(self, number: int = signal.SIGINT.value, **settings):
        super().__init__(**settings)
        self.number = number

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2:
            signal.raise_signal(self.number)


class WordyModule(TinyModule):
    """Writes more than fits on a small disk."""

    def on_train_epoch_end(self) -> None:
        self._write()

    on_test_epoch_end = on_train_epoch_end

    def _write(self) -> None:
        write_atomically(Path(self.trainer.default_root_dir) / "long.txt", "long" * 1000)


class FullDiskModule(TinyModule):
    """Finds the disk full in its third epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "results.jsonl")


class TinyData(LightningDataModule):
    """A few batches of one."""

    def __init__(self, num_samples: int = 3):
        super().__init__()
        self.num_samples = num_samples

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(self.num_samples, 1))  # type: ignore[arg-type]

    test_dataloader = train_dataloader
