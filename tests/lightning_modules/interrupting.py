"""What the tests of interrupted runs put into a run."""

import os
import signal
from typing import Any, ClassVar

import lightning
import torch

from dsg.attacks import Attacker, AttackLoss
from dsg.attacks.task import next_token_loss


class Kill(lightning.Callback):
    """Ends the process without any warning before training step `step` (from 0)."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Noisy(Attacker):
    """Draws a random number for each batch, so that a lost generator state shows."""

    name: ClassVar[str] = "noisy"

    def __call__(self, forward: Any, batch: Any, guard: Any) -> AttackLoss:
        del guard
        return AttackLoss(next_token_loss(forward, batch) * torch.rand(()), {})
