"""Relearning attack as a `fit` run: an attacker fine-tunes the model to get the knowledge back."""

from contextlib import nullcontext
from typing import Any, Literal

import lightning
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from dsg.attacks import LORA_TARGETS, prepare_attack
from dsg.errors import UserError
from dsg.guard import Guard
from dsg.hooks import unwrap
from dsg.recipes import GuardSettings
from dsg.scoring import ClozeBatch, PassageBatch
from dsg.tokens import TokenBatch
from lightning_modules.distributed import exclude_frozen_from_ddp
from lightning_modules.guards import make_guard
from lightning_modules.loading import load_model, short_name
from lightning_modules.measuring import (
    Labels,
    Measurer,
    epochs_done,
    require_full_sanity_check,
)
from lightning_modules.protocols import EVALUATION_DATA, data_of
from lightning_modules.saving import keep_trainable


class RelearningModule(lightning.LightningModule):
    """Fine-tunes a model on the attacker's text; measures before it and after every epoch.

    The data module's `train_dataloader` yields `TokenBatch`es. The guard, if any, is made from the
    raw model before the attack and is then fixed. Every evaluation scores the model with the guard
    off (whoever holds the weights can remove it) and on (the model is served behind an interface).

    Args:
        model_name: Hugging Face folder or hub name of the model to attack.
        guard: How to make the guard; None only with mode `none`.
        mode: `test_time`: the attacker trains the raw model. `train_time`: the guard is in the
            forward pass during training too. `none`: there is no guard.
        adapter: `full` trains every weight, `lora` a new adapter.
        lr: Learning rate of AdamW, constant.
        weight_decay: Decoupled weight decay.
        lora_rank: Rank of the adapter.
        lora_alpha: Scale of the adapter (`lora_alpha / lora_rank` times its output).
        lora_targets: Names of the linear layers that get an adapter.
        base_model_name: The model against which the alignment score is computed; needed if the
            attacked model's weights were changed to forget, None for the attacked model itself.
        method: The `method` column; None takes the guard's, or `base`.
        experiment: The `experiment` column.
        seed: The `seed` column.
        model_label: The `model` column; None takes the model's name.

    Raises:
        UserError: `mode` and `guard` contradict each other.
    """

    def __init__(
        self,
        model_name: str,
        guard: GuardSettings | None = None,
        mode: Literal["none", "test_time", "train_time"] = "none",
        adapter: Literal["full", "lora"] = "full",
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        lora_rank: int = 8,
        lora_alpha: float = 16.0,
        lora_targets: list[str] | None = None,
        base_model_name: str | None = None,
        method: str | None = None,
        experiment: str = "relearning",
        seed: int | None = None,
        model_label: str | None = None,
    ) -> None:
        super().__init__()
        if (guard is None) != (mode == "none"):
            raise UserError(
                f"`mode` must be 'none' exactly if `guard` is missing, got mode {mode!r} "
                f"{'without' if guard is None else 'with'} a guard; change one of them."
            )
        self.model_name = model_name
        self.guard_settings = guard
        self.mode = mode
        self.adapter: Literal["full", "lora"] = adapter
        self.lr = lr
        self.weight_decay = weight_decay
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.lora_targets = list(lora_targets or LORA_TARGETS)
        self.base_model_name = base_model_name
        self.method = method or (guard.method if guard else "base")
        self.experiment = experiment
        self.seed = seed
        self.model_label = model_label or short_name(model_name)
        # A checkpoint holds only what the attack changed.
        self.strict_loading = False
        self.measurer = Measurer()
        self.model: torch.nn.Module | None = None
        self.base_model: PreTrainedModel | None = None
        self.guard: Guard | None = None

    def configure_model(self) -> None:
        """Load the model, make the guard from it, and only then prepare the attack; once."""
        if self.model is not None:
            return
        model = load_model(self.model_name)
        if self.base_model_name is not None:
            self.base_model = load_model(self.base_model_name)
        if self.guard_settings is not None:
            self.guard = make_guard(self.guard_settings, model, self.trainer)
        self.model = prepare_attack(
            model, self.adapter, self.lora_rank, self.lora_alpha, self.lora_targets
        )
        exclude_frozen_from_ddp(self)

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Float[Tensor, ""]:
        """Mean next-token cross-entropy over the real tokens of the batch, in nats."""
        del batch_idx
        assert self.model is not None
        inputs: dict[str, Any] = {**batch.model_inputs(), "use_cache": False}
        inputs["labels"] = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        guarded = self.guard is not None and self.mode == "train_time"
        if guarded:
            inputs["token_mask"] = batch.token_mask
        model = unwrap(self.model)
        attached = self.guard.attached(model) if self.guard and guarded else nullcontext()
        with attached:
            loss = model(**inputs).loss
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.input_ids))
        return loss

    def on_validation_start(self) -> None:
        """Begin an evaluation."""
        data = data_of(self.trainer, *EVALUATION_DATA)
        base_model = self.base_model if self.trainer.sanity_checking else None
        self.measurer.start(data, data.val_split, self.guard, base_model)

    def validation_step(
        self, batch: ClozeBatch | PassageBatch | None, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Score a batch."""
        del batch_idx, dataloader_idx
        assert self.model is not None
        self.measurer.update(self.model, batch, self.guard)

    def on_validation_epoch_end(self) -> None:
        """Log and write the results; epoch 0 is the state before the attack."""
        labels = Labels(
            experiment=self.experiment,
            method=self.method,
            model=self.model_label,
            dataset=data_of(self.trainer, "name").name,
            mode=None if self.mode == "none" else self.mode,
            attack=f"relearn_{self.adapter}",
            seed=self.seed,
        )
        self.measurer.finish(self.trainer, labels, stage="val", epoch=epochs_done(self.trainer))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over what the attacker may change."""
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        return torch.optim.AdamW(weights, lr=self.lr, weight_decay=self.weight_decay)

    def on_fit_start(self) -> None:
        """Check that the state before the attack will be measured."""
        require_full_sanity_check(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the attack changed and what was measured."""
        keep_trainable(self, checkpoint)
        checkpoint["measurer"] = self.measurer.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the measurements of the interrupted run."""
        self.measurer.load_state(checkpoint["measurer"])
