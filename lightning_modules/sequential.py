"""Sequential forget requests as a `fit` run: one epoch is one request."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from jaxtyping import Float
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import PreTrainedModel

from dsg.errors import UserError
from dsg.evaluation import AnyBatch
from dsg.guard import GuardBuilder, GuardSettings, GuardStack
from dsg.lm import Reference, finite_loss, load_plain_model, short_name, trainable_weights
from dsg.objectives import Objective
from dsg.objectives.terms import check_positive
from lightning_modules.parts.distributed import exclude_frozen_from_ddp, leave_unwrapped
from lightning_modules.parts.guards import guard_maker, guard_of
from lightning_modules.parts.measuring import Labels, Measurer
from lightning_modules.parts.precision import use_precision
from lightning_modules.parts.progress import Progress, require_whole_epochs
from lightning_modules.parts.protocols import (
    GUARD_DATA,
    REQUEST_DATA,
    Reads,
    UnlearningBatch,
    data_of,
)
from lightning_modules.parts.resuming import check_same_run, described, restore_rng, rng_states
from lightning_modules.parts.saving import keep_trainable, load_guards, save_youngest


class SequentialModule(lightning.LightningModule):
    """Fulfils one forget request per epoch and then measures all of them again.

    With `guard`, an epoch appends to the stack the guard that an evaluation of the request alone
    would make, from the plain model with every guard detached; its batches count for nothing and no
    weight changes. With `objective`, an epoch trains on the request's batches; the reference stays
    the original model.

    Args:
        model_name: Hugging Face folder or hub name of the model.
        guard: How to make the guard of each request; excludes `objective`.
        objective: The method that changes the weights; excludes `guard`.
        reference: `frozen_copy` for a method that compares with the original model.
        lr: Learning rate of AdamW, constant, > 0; guards read none.
        experiment: The `experiment` column.
        seed: The `seed` column.
        model_label: The `model` column; None takes the model's name.

    Raises:
        UserError: Not exactly one of `guard` and `objective` is given, the objective is no loss
            that requests can descend on one after the other, it lacks its reference, or `lr` is not
            positive.
    """

    reads: Reads = "unlearn"
    keeps_rest: bool = False

    def __init__(
        self,
        model_name: str,
        guard: GuardSettings | None = None,
        objective: Objective | None = None,
        reference: Literal["none", "frozen_copy"] = "none",
        lr: float = 1e-5,
        experiment: str = "sequential",
        seed: int | None = None,
        model_label: str | None = None,
    ) -> None:
        super().__init__()
        if (guard is None) == (objective is None):
            raise UserError(
                "exactly one of `guard` and `objective` must be given, got "
                f"{'neither' if guard is None else 'both'}; choose how requests are fulfilled."
            )
        check_positive(lr=lr)
        if objective is not None:
            objective.check_reference(reference, "full")
            if objective.changes_at_end:
                raise UserError(
                    "`objective` must be a loss to descend on request after request, got "
                    f"{type(objective).__name__}, which changes the weights at the end; choose "
                    "another."
                )
        self.model_name = model_name
        self.guard_settings = guard
        self.objective = objective
        self.reference_kind: Literal["none", "frozen_copy"] = reference
        self.lr = lr
        self.experiment = experiment
        self.seed = seed
        self.model_label = model_label or short_name(model_name)
        # Guards are appended, not optimized.
        self.automatic_optimization = guard is None
        self.keeps_rest = guard is not None
        self.strict_loading = False
        self.measurer = Measurer()
        self.progress = Progress()
        self.model: PreTrainedModel | None = None
        self.reference: Reference | None = None
        self.maker: GuardBuilder | None = None
        self.guards = GuardStack()

    def setup(self, stage: str) -> None:
        """Check that all states are measured; let `fit` run without trainable weights.

        Raises:
            UserError: The trainer measures otherwise, does not reload the data, or ends within a
                request.
        """
        if stage == "fit":
            self._check_trainer()
        if self.guard_settings is not None:
            leave_unwrapped(self.trainer.strategy)

    def configure_model(self) -> None:
        """Load the model and what changes or guards it, once."""
        if self.model is not None:
            return
        use_precision(self.trainer)
        self.model = load_plain_model(self.model_name)
        self.trainer.precision_plugin.convert_module(self.model)  # before it is copied
        if self.guard_settings is not None:
            self.maker = guard_maker(self.guard_settings, self.model, self.trainer)
        if self.objective is not None:
            self.objective.prepare(self.model.requires_grad_(True))
            self.reference = self.objective.make_reference(self.reference_kind, self.model)
            exclude_frozen_from_ddp(self)

    def training_step(self, batch: UnlearningBatch, batch_idx: int) -> Float[Tensor, ""] | None:
        """Take the objective's loss; guards need no step."""
        del batch_idx
        if self.objective is None:
            return None
        assert self.model is not None
        loss = self.objective(
            self.model,
            batch["forget"],
            batch["retain"],
            reference=self.reference,
            step=self.trainer.global_step,
        ).total
        finite_loss(loss, self.global_step)
        self.log("train/total_loss", loss, batch_size=len(batch["forget"].input_ids))
        return loss

    def on_train_batch_end(
        self, outputs: Any, batch: UnlearningBatch | None, batch_idx: int
    ) -> None:
        """Append the request's guard after the last batch.

        Not in `training_step`, which Lightning skips on a rank without a batch, nor in
        `on_train_epoch_end`, which comes after the validation that is to measure the guard.
        """
        del outputs, batch, batch_idx
        if self.maker is not None and self.trainer.is_last_batch:
            data = data_of(self.trainer, *GUARD_DATA)
            self.guards.append(guard_of(self.maker, data))
            save_youngest(self.trainer, self.guards)

    def on_validation_start(self) -> None:
        """Begin an evaluation of all requests."""
        data = data_of(self.trainer, *REQUEST_DATA)
        self.measurer.start(data, data.val_split, self._stack())

    def validation_step(
        self, batch: AnyBatch | None, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Score a batch."""
        del batch_idx, dataloader_idx
        assert self.model is not None
        self.measurer.update(self.model, batch, self._stack())

    def on_validation_epoch_end(self) -> None:
        """Log and write the results; request 0 is the state before the first one."""
        data = data_of(self.trainer, *REQUEST_DATA)
        labels = Labels(
            experiment=self.experiment,
            method=self._method(),
            model=self.model_label,
            dataset=data.name,
            seed=self.seed,
        )
        request = int(self.progress.epochs(self.trainer))
        self.measurer.finish(
            self.trainer,
            labels,
            stage="val",
            epoch=request,
            step=self.progress.step(self.trainer),
            request=request,
            forget_domains=tuple(data.request_domains[:request]),
        )

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """AdamW over the weights that the objective may change; nothing for guards."""
        if self.objective is None:
            return None
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        return torch.optim.AdamW(weights, lr=self.lr, weight_decay=0.0)

    def on_fit_start(self) -> None:
        """Check that every request has its epoch, and catch up when resumed.

        Raises:
            UserError: It has not.
        """
        num_requests = len(data_of(self.trainer, *REQUEST_DATA).request_domains)
        if self.trainer.max_epochs != num_requests:
            raise UserError(
                f"`max_epochs` must be the number of requests, {num_requests}, got "
                f"{self.trainer.max_epochs}; set trainer.max_epochs."
            )
        self.progress.catch_up(self, self.measurer.measured_epochs())

    def on_train_epoch_end(self) -> None:
        """Write a checkpoint after a request that took no optimizer step.

        `ModelCheckpoint` skips those: it takes a standing step count for nothing new.
        """
        callback = self.trainer.checkpoint_callback
        if self.maker is not None and isinstance(callback, ModelCheckpoint):
            name = f"request_{len(self.guards)}.ckpt"
            self.trainer.save_checkpoint(Path(callback.dirpath or ".") / name)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the requests changed; the guards lie in the run directory."""
        keep_trainable(self, checkpoint)
        checkpoint["measurer"] = self.measurer.state()
        checkpoint["num_guards"] = len(self.guards)
        checkpoint["settings"] = self._settings()
        checkpoint["epochs"] = self.progress.state(self.trainer)
        checkpoint["rng"] = rng_states()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the measurements and guards of the interrupted run.

        Raises:
            UserError: The checkpoint is of another run.
        """
        check_same_run(checkpoint, self._settings(), trainable_weights(self).keys())
        self.measurer.load_state(checkpoint["measurer"])
        self.progress.load(checkpoint["epochs"], checkpoint["global_step"])
        restore_rng(checkpoint["rng"])
        for guard in load_guards(self.trainer, checkpoint["num_guards"]):
            self.guards.append(guard)

    def _check_trainer(self) -> None:
        require_whole_epochs(self.trainer)
        # Lightning sets the attribute without declaring it.
        reload_every: int = getattr(self.trainer, "reload_dataloaders_every_n_epochs")  # noqa: B009
        if reload_every != 1:
            raise UserError(
                "`reload_dataloaders_every_n_epochs` must be 1, because every epoch is another "
                f"request, got {reload_every}; set trainer.reload_dataloaders_every_n_epochs: 1."
            )
        if self.trainer.max_steps != -1 or self.trainer.check_val_every_n_epoch != 1:
            raise UserError(
                "`max_steps` must be -1 and `check_val_every_n_epoch` 1, because every request is "
                f"fulfilled and then measured, got {self.trainer.max_steps} and "
                f"{self.trainer.check_val_every_n_epoch}; remove them."
            )

    def _settings(self) -> dict[str, Any]:
        """What decides the outcome of this run, in plain values."""
        return {
            "model_name": self.model_name,
            "guard": asdict(self.guard_settings) if self.guard_settings else None,
            "objective": described(self.objective) if self.objective else None,
            "reference": self.reference_kind,
            "lr": self.lr,
            "experiment": self.experiment,
            "seed": self.seed,
            "model_label": self.model_label,
        }

    def _method(self) -> str:
        if self.guard_settings is not None:
            return self.guard_settings.method
        assert self.objective is not None
        return self.objective.name

    def _stack(self) -> GuardStack | None:
        return self.guards if len(self.guards) else None
