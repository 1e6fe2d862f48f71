"""Fine-tunes a causal LM on a data module's text: `fit`."""

import math
from typing import Any, Literal

import lightning
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsg.errors import UserError
from dsg.lm import (
    LORA_TARGETS,
    TokenBatch,
    finite_loss,
    load_plain_model,
    make_trainable,
    mean_nll,
    next_token_logits,
    trainable_weights,
)
from lightning_modules.parts.distributed import exclude_frozen_from_ddp
from lightning_modules.parts.precision import use_precision
from lightning_modules.parts.protocols import Reads
from lightning_modules.parts.resuming import check_same_run, restore_rng, rng_states
from lightning_modules.parts.saving import keep_trainable, save_model_folder


class FinetuningModule(lightning.LightningModule):
    """Teaches a model a text; nothing is evaluated.

    The data module's `train_dataloader` yields `TokenBatch`es whose token mask tells which tokens
    are learnt. At the end of `fit` the model, or the adapter, lies in `<run directory>/model`.

    Args:
        model_name: Hugging Face folder or hub name of the model; an adapter is merged first.
        adapter: `full` trains every weight, `lora` a new adapter, which stays unmerged.
        lr: Highest learning rate of AdamW, above 0.
        weight_decay: Decoupled weight decay.
        schedule: What follows the warm-up: `constant`, or `linear` down to 0.
        warmup_fraction: Share of the optimizer steps with a linearly rising learning rate, in
            `[0, 1)`.
        lora_rank: Rank of the adapter.
        lora_alpha: Scale of the adapter (`lora_alpha / lora_rank` times its output).
        lora_targets: Names of the linear layers that get an adapter.

    Raises:
        UserError: `lr` or `warmup_fraction` is out of range.
    """

    reads: Reads = "finetune"
    keeps_rest: bool = False

    def __init__(
        self,
        model_name: str,
        adapter: Literal["full", "lora"] = "full",
        lr: float = 1e-5,
        weight_decay: float = 0.0,
        schedule: Literal["constant", "linear"] = "constant",
        warmup_fraction: float = 0.0,
        lora_rank: int = 8,
        lora_alpha: float = 16.0,
        lora_targets: list[str] | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 < lr < float("inf"):
            raise UserError(f"`lr` must be finite and above 0, got {lr}; try 1e-5.")
        if not 0.0 <= warmup_fraction < 1.0:
            raise UserError(f"`warmup_fraction` must be in [0, 1), got {warmup_fraction}; try 0.1.")
        self.model_name = model_name
        self.adapter: Literal["full", "lora"] = adapter
        self.lr = lr
        self.weight_decay = weight_decay
        self.schedule: Literal["constant", "linear"] = schedule
        self.warmup_fraction = warmup_fraction
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.lora_targets = list(lora_targets or LORA_TARGETS)
        # A checkpoint holds only what training changed.
        self.strict_loading = False
        self.model: nn.Module | None = None

    def configure_model(self) -> None:
        """Load the model and choose the weights that train, once."""
        if self.model is not None:
            return
        use_precision(self.trainer)
        self.model = make_trainable(
            load_plain_model(self.model_name),
            self.adapter,
            self.lora_rank,
            self.lora_alpha,
            self.lora_targets,
        )
        exclude_frozen_from_ddp(self)

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Float[Tensor, ""]:
        """Mean cross-entropy of the learnt tokens, in nats."""
        del batch_idx
        assert self.model is not None
        loss = mean_nll(next_token_logits(self.model, batch), batch)
        finite_loss(loss, self.global_step)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.input_ids))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over what trains."""
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        return torch.optim.AdamW(weights, lr=self.lr, weight_decay=self.weight_decay)

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
        assert self.model is not None
        self.model.eval()
        save_model_folder(self.trainer, self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what training changed."""
        keep_trainable(self, checkpoint)
        checkpoint["settings"] = self._settings()
        checkpoint["rng"] = rng_states()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the interrupted run.

        Raises:
            UserError: The checkpoint is of another run.
        """
        check_same_run(checkpoint, self._settings(), trainable_weights(self).keys())
        restore_rng(checkpoint["rng"])

    def _settings(self) -> dict[str, Any]:
        """What decides the outcome of this run, in plain values."""
        return {
            "model_name": self.model_name,
            "adapter": self.adapter,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "schedule": [self.schedule, self.warmup_fraction],
            "lora": [self.lora_rank, self.lora_alpha, *self.lora_targets],
        }


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
