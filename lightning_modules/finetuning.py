"""Fine-tunes a causal LM on a data module's text: `fit`."""

import math
from typing import Any, Literal

import lightning
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsg.errors import UserError
from dsg.lm import TokenBatch, finite_loss, mean_nll, next_token_logits
from lightning_modules.parts.saving import save_model_folder
from lightning_modules.parts.training import Trainable


class FinetuningModule(Trainable):
    """Teaches a model a text; nothing is evaluated.

    The data module's `train_dataloader` yields `TokenBatch`es whose token mask tells which tokens
    are learnt. At the end of `fit` the model, or the adapter, lies in `<run directory>/model`.

    Args:
        model_name: Hugging Face folder or hub name of the model; an adapter is merged first.
        schedule: What follows the warm-up: `constant`, or `linear` down to 0.
        warmup_fraction: Share of the optimizer steps with a linearly rising learning rate, in
            `[0, 1)`.
        settings: Those of `Trainable`; `lr` is the highest learning rate.

    Raises:
        UserError: `lr` or `warmup_fraction` is out of range.
    """

    reads = "finetune"

    def __init__(
        self,
        model_name: str,
        schedule: Literal["constant", "linear"] = "constant",
        warmup_fraction: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if not 0.0 <= warmup_fraction < 1.0:
            raise UserError(f"`warmup_fraction` must be in [0, 1), got {warmup_fraction}; try 0.1.")
        self.model_name = model_name
        self.schedule: Literal["constant", "linear"] = schedule
        self.warmup_fraction = warmup_fraction
        self.register_module("model", None)

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Choose the weights that train."""
        return self.make_trainable(model)

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Float[Tensor, ""]:
        """Mean cross-entropy of the learnt tokens, in nats."""
        del batch_idx
        loss = mean_nll(next_token_logits(self.model, batch), batch)
        finite_loss(loss, self.global_step)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.input_ids))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate of this step.

        Not through a scheduler, which must know the number of steps when the optimizer is made:
        asking for it then makes Lightning forget a resumed run's place in its epoch.
        """
        step = self.trainer.global_step
        factor = lr_factor(step, num_steps(self.trainer), self.warmup_fraction, self.schedule)
        for group in optimizer.param_groups:
            group["lr"] = self.lr * factor

    def on_fit_start(self) -> None:
        """Check that the run has an end.

        Raises:
            UserError: It goes on until it is stopped.
        """
        if self.trainer.max_epochs == -1 and self.trainer.max_steps == -1:
            raise UserError(
                "`max_epochs` must be at least 1, got -1 without `max_steps`: the learning rates "
                "depend on the length of the run; set trainer.max_epochs."
            )

    def on_fit_end(self) -> None:
        """Leave an ordinary Hugging Face folder behind."""
        self.model.eval()
        save_model_folder(self.trainer, self.model)


def num_steps(trainer: lightning.Trainer) -> int:
    """Optimizer steps of a whole run that is under way."""
    per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    limits = [(trainer.max_epochs or 0) * per_epoch, trainer.max_steps]
    return min(limit for limit in limits if limit > 0)


def lr_factor(
    step: int, num_steps: int, warmup_fraction: float, schedule: Literal["constant", "linear"]
) -> float:
    """Learning rate at `step`, relative to its highest.

    Args:
        step: Optimizer steps taken so far, from 0.
        num_steps: Optimizer steps of the whole run.
        warmup_fraction: Share of them that warms up, in `[0, 1)`.
        schedule: What follows.
    """
    num_warmup_steps = round(warmup_fraction * num_steps)
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    if schedule == "constant":
        return 1.0
    return max(0.0, (num_steps - step) / (num_steps - num_warmup_steps))
