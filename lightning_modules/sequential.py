"""Sequential forget requests as a `fit` run: one epoch is one request."""

from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsg.errors import UserError
from dsg.guard import Guard, GuardBuilder, GuardSettings, GuardStack
from dsg.lm import Reference, finite_loss
from dsg.objectives import Objective
from dsg.objectives.terms import check_positive
from lightning_modules.parts.distributed import leave_unwrapped
from lightning_modules.parts.guards import guard_maker, guard_of
from lightning_modules.parts.measured_training import MeasuredTraining
from lightning_modules.parts.protocols import (
    GUARD_DATA,
    REQUEST_DATA,
    Split,
    UnlearningBatch,
    data_of,
)

GUARDS_FOLDER = "guards"


class SequentialModule(MeasuredTraining):
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
        labels: Those of `Run`.

    Raises:
        UserError: Not exactly one of `guard` and `objective` is given, the objective is no loss
            that requests can descend on one after the other, it lacks its reference, or `lr` is not
            positive.
    """

    kind = "sequential"
    reads = "unlearn"

    def __init__(
        self,
        model_name: str,
        guard: GuardSettings | None = None,
        objective: Objective | None = None,
        reference: Literal["none", "frozen_copy"] = "none",
        lr: float = 1e-5,
        **labels: Any,
    ) -> None:
        if (guard is None) == (objective is None):
            raise UserError(
                "exactly one of `guard` and `objective` must be given, got "
                f"{'neither' if guard is None else 'both'}; choose how requests are fulfilled."
            )
        method = guard.method if guard else objective.name if objective else ""
        super().__init__(model_name=model_name, guard=guard, method=method, **labels)
        check_positive(lr=lr)
        if objective is not None:
            objective.check_reference(reference, "full")
            if objective.changes_at_end:
                raise UserError(
                    "`objective` must be a loss to descend on request after request, got "
                    f"{type(objective).__name__}, which changes the weights at the end; choose "
                    "another."
                )
        self.objective = objective
        self.reference_kind: Literal["none", "frozen_copy"] = reference
        self.lr = lr
        # Guards are appended, not optimized.
        self.automatic_optimization = guard is None
        self.keeps_rest = guard is not None
        self.reference: Reference | None = None
        self.builder: GuardBuilder | None = None
        self.guards = GuardStack()

    def setup(self, stage: str) -> None:
        """Check that all states are measured; let `fit` run without trainable weights.

        Raises:
            UserError: The trainer measures otherwise, does not reload the data, or ends within a
                request.
        """
        super().setup(stage)
        if stage == "fit":
            self._check_trainer()
        if self.guard_settings is not None:
            leave_unwrapped(self.trainer.strategy)

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Prepare what makes the guards, or choose the weights that train and fix the reference."""
        if self.guard_settings is not None:
            self.builder = guard_maker(self.guard_settings, model, self.trainer)
        if self.objective is not None:
            self.objective.prepare(model.requires_grad_(True))
            self.reference = self.objective.make_reference(self.reference_kind, model)
        return model

    def training_step(self, batch: UnlearningBatch, batch_idx: int) -> Float[Tensor, ""] | None:
        """Take the objective's loss; guards need no step."""
        del batch_idx
        if self.objective is None:
            return None
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
        if self.builder is not None and self.trainer.is_last_batch:
            data = data_of(self.trainer, *GUARD_DATA)
            self.guards.append(guard_of(self.builder, data))
            if self.trainer.is_global_zero:
                self.guards.guards[-1].save(self._guard_folder(len(self.guards)))

    def begin(self, split: Split, **options: Any) -> None:
        """Begin an evaluation of all requests."""
        super().begin(split, guard=self.guards if len(self.guards) else None, **options)

    def on_validation_epoch_end(self) -> None:
        """Log and write the results; request 0 is the state before the first one."""
        request = int(self.epochs)
        domains = data_of(self.trainer, *REQUEST_DATA).request_domains
        self.finish(
            "val",
            step=self.steps,
            epoch=request,
            request=request,
            forget_domains=tuple(domains[:request]),
        )

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
        super().on_fit_start()

    def on_train_epoch_end(self) -> None:
        """Write a checkpoint after a request that took no optimizer step.

        `ModelCheckpoint` skips those: it takes a standing step count for nothing new.
        """
        callback = self.trainer.checkpoint_callback
        if self.builder is not None and isinstance(callback, ModelCheckpoint):
            name = f"request_{len(self.guards)}.ckpt"
            self.trainer.save_checkpoint(Path(callback.dirpath or ".") / name)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the requests changed; the guards lie in the run directory."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["num_guards"] = len(self.guards)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the measurements and guards of the interrupted run.

        Raises:
            UserError: The checkpoint is of another run.
        """
        super().on_load_checkpoint(checkpoint)
        for number in range(1, checkpoint["num_guards"] + 1):
            self.guards.append(Guard.load(self._guard_folder(number)))

    def _guard_folder(self, number: int) -> Path:
        return self.run_dir / GUARDS_FOLDER / f"request_{number}"

    def _check_trainer(self) -> None:
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
