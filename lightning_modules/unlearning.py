"""Unlearning by changing weights as a `fit` run, whatever the method."""

import time
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsg.errors import UserError
from dsg.lm import Reference, finite_loss, trainable_weights
from dsg.objectives import Objective, OneShot, ReferenceKind
from lightning_modules.parts.distributed import add_tensors_over_ranks, leave_unwrapped
from lightning_modules.parts.measured_training import MeasuredTraining
from lightning_modules.parts.protocols import Split, UnlearningBatch
from lightning_modules.parts.saving import save_model_folder
from lightning_modules.parts.training import Trainable


class UnlearningModule(Trainable, MeasuredTraining):
    """Makes a model forget; measures before it and after every epoch.

    The data module's `train_dataloader` yields `UnlearningBatch`es. At the end of `fit` the changed
    model, or the adapter, lies in `<run directory>/model`, and `run.json` tells how long training
    took without the evaluations (`unlearn_seconds`).

    Args:
        model_name: Hugging Face folder or hub name of the model; an adapter is merged first.
        objective: The method. A `OneShot` trains all weights and reads no learning rate.
        reference: What the method compares with, if it needs it: `frozen_copy` of the model, or
            `adapter_off`, a second forward pass through the model under the adapter.
        settings: Those of `Trainable` and the labels of `Run`.

    Raises:
        UserError: `lr` is not positive, or objective, reference and adapter do not suit each other.
    """

    kind = "unlearning"
    reads = "unlearn"

    def __init__(
        self,
        model_name: str,
        objective: Objective,
        reference: ReferenceKind = "none",
        **settings: Any,
    ) -> None:
        super().__init__(
            model_name=model_name,
            guard=None,
            method=objective.name,
            weight_decay=0.0,
            **settings,
        )
        objective.check_reference(reference, self.adapter)
        self.objective = objective
        self.one_shot = objective if isinstance(objective, OneShot) else None
        if self.one_shot is not None and self.adapter != "full":
            raise UserError(
                f"`adapter` must be 'full' for {type(objective).__name__}, got {self.adapter!r}: a "
                "new adapter holds no weight that could be dampened; change it."
            )
        # Every text counts in the sums of a single pass, and no optimizer takes a step.
        self.keeps_rest = self.one_shot is not None
        self.automatic_optimization = self.one_shot is None
        self.reference_kind: ReferenceKind = reference
        self.reference: Reference | None = None
        self.stopwatch = Stopwatch()
        self._added: list[Tensor] | None = None
        self._unfinished: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        """Check what will be measured; let a single pass run under DDP, which has no gradients.

        Raises:
            UserError: The trainer's settings do not fit.
        """
        super().setup(stage)
        if self.one_shot is None:
            return
        if stage == "fit" and self.trainer.max_epochs != 1:
            raise UserError(
                f"`max_epochs` must be 1 for {type(self.one_shot).__name__}, which reads all texts "
                f"once, got {self.trainer.max_epochs}; set trainer.max_epochs: 1."
            )
        leave_unwrapped(self.trainer.strategy)

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Choose the weights that train and fix the reference."""
        trained = self.make_trainable(model)
        self.objective.prepare(trained)
        self.reference = self.objective.make_reference(self.reference_kind, trained)
        return trained

    def training_step(self, batch: UnlearningBatch, batch_idx: int) -> Float[Tensor, ""] | None:
        """The loss of a forget and a retain batch; None where it is not descended on."""
        del batch_idx
        forget, retain = batch["forget"], batch["retain"]
        if self.one_shot is not None:
            self._added, loss = self.one_shot.measure(self.model, forget, retain)
        else:
            loss = self.objective(
                self.model, forget, retain, reference=self.reference, step=self.trainer.global_step
            )
        finite_loss(loss.total, self.global_step)
        parts = {f"train/{name}_loss": value for name, value in loss._asdict().items()}
        self.log_dict(parts, batch_size=len(forget.input_ids))
        return loss.total if self.one_shot is None else None

    def on_train_batch_end(
        self, outputs: Any, batch: UnlearningBatch | None, batch_idx: int
    ) -> None:
        """Add what all ranks measured to the sums of a single pass.

        Not in `training_step`, which Lightning skips on a rank without a batch.
        """
        del outputs, batch, batch_idx
        if self.one_shot is None:
            return
        sums = self.one_shot.sums()
        added = self._added or [torch.zeros_like(total) for total in sums]
        add_tensors_over_ranks(sums, added, self.trainer.strategy.root_device)
        self._added = None

    def on_train_start(self) -> None:
        """Start the clock."""
        self.stopwatch.start()

    def on_train_end(self) -> None:
        """Stop the clock, and measure a training that ends within an epoch."""
        super().on_train_end()
        self.stopwatch.stop()

    def begin(self, split: Split, **options: Any) -> None:
        """Begin an evaluation of what a training that ends here would leave."""
        self.stopwatch.stop()
        super().begin(split, **options)
        # The sanity check of a resumed run may make up for an evaluation that was missed.
        if self.objective.changes_at_end and self.epochs > 0:
            weights = trainable_weights(self.model)
            self._unfinished = {name: weight.clone() for name, weight in weights.items()}
            self.objective.finish(self.model)

    def on_validation_epoch_end(self) -> None:
        """Log and write the results; epoch 0 is the state before unlearning."""
        super().on_validation_epoch_end()
        # Before any checkpoint is written: training goes on from where it was.
        with torch.no_grad():
            for name, weight in self._unfinished.items():
                self.model.get_parameter(name).copy_(weight)
        self._unfinished = {}
        if not self.trainer.sanity_checking:
            self.stopwatch.start()

    def on_fit_end(self) -> None:
        """Finish and save the changed model."""
        self.stopwatch.start()
        self.objective.finish(self.model)
        self.stopwatch.stop()
        save_model_folder(self.trainer, self.model)
        self.add_facts({"unlearn_seconds": round(self.stopwatch.seconds, 2)})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what unlearning changed and what was measured."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["unlearn_seconds"] = self.stopwatch.seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the interrupted run.

        Raises:
            UserError: The checkpoint is of another run.
        """
        super().on_load_checkpoint(checkpoint)
        self.stopwatch = Stopwatch(checkpoint["unlearn_seconds"])


class Stopwatch:
    """Seconds of wall time while it ran.

    Args:
        seconds: What it shows at first.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """What it shows now."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._seconds + running

    def start(self) -> None:
        """Go on."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Pause; once stopped, this does nothing."""
        self._seconds, self._started = self.seconds, None
