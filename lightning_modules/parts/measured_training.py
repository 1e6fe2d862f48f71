"""Training that is measured: before it, after every epoch, and wherever it ends."""

from typing import Any

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

from dsg.errors import UserError
from lightning_modules.parts.measuring import Measured
from lightning_modules.parts.protocols import data_of, val_loaders
from lightning_modules.parts.training import Trained


class MeasuredTraining(Trained, Measured):
    """A training that is measured before it, after every epoch and at its end.

    Lightning evaluates after whole epochs only, so that a run which ends within one would never
    measure the model that it leaves; and after a checkpoint of an epoch's last batch it goes on
    with the next epoch, so that the evaluation which was to follow that batch would never take
    place. Both evaluations are made up for.
    """

    # Epochs and optimizer steps behind the weights, where the trainer counts others.
    _at: tuple[float, int] | None = None

    def setup(self, stage: str) -> None:
        """Check what will be measured.

        Raises:
            UserError: The trainer would measure something else.
        """
        if stage == "fit":
            require_whole_epochs(self.trainer)

    def on_fit_start(self) -> None:
        """Measure the model of the checkpoint that is resumed, unless that has been done."""
        if self._at is not None:
            epochs, step = self._at
            was_end = 0 < self.trainer.max_steps <= step
            if (float(epochs).is_integer() or was_end) and epochs not in self._measured_epochs():
                self._evaluate()
        self._at = None

    def on_validation_epoch_end(self) -> None:
        """Log and write the results; epoch 0 is the state before training."""
        self.finish("val", epoch=self.epochs, step=self.steps)

    def on_train_end(self) -> None:
        """Measure a training that ends within an epoch, which then counts as complete."""
        trainer = self.trainer
        if trainer.limit_val_batches == 0:
            return
        epochs = round(trainer.current_epoch - 1 + _share(trainer), 4)
        if epochs not in self._measured_epochs():
            self._at = (epochs, trainer.global_step)
            self._evaluate()
            self._at = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was measured, and how many epochs are behind the weights."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["measurer"] = {"rows": self.measurer.rows, "baseline": self.measurer.baseline}
        checkpoint["epochs"] = self.trainer.current_epoch + _share(self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from what was measured; an evaluation of the checkpoint writes its own rows.

        Raises:
            UserError: The checkpoint is of another run.
        """
        super().on_load_checkpoint(checkpoint)
        self._at = (round(checkpoint["epochs"], 4), checkpoint["global_step"])
        self.measurer.baseline = checkpoint["measurer"]["baseline"]
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.measurer.rows = checkpoint["measurer"]["rows"]

    @property
    def epochs(self) -> float:
        """Epochs behind the weights: those of a checkpoint just loaded, if any."""
        if self._at is not None:
            return self._at[0]
        return 0 if self.trainer.sanity_checking else self.trainer.current_epoch + 1

    @property
    def steps(self) -> int:
        """Optimizer steps behind the weights."""
        return self.trainer.global_step if self._at is None else self._at[1]

    def _measured_epochs(self) -> set[Any]:
        return {row["epoch"] for row in self.measurer.rows}

    def _evaluate(self) -> None:
        """What Lightning does in an evaluation, without touching generators or modules' modes."""
        modes = {part: part.training for part in self.modules()}
        self.eval()
        precision = self.trainer.precision_plugin.val_step_context()
        with isolate_rng(), torch.no_grad(), precision:
            self.on_validation_start()
            for number, loader in enumerate(val_loaders(data_of(self.trainer))):
                for index, batch in enumerate(loader):
                    moved = batch if batch is None else batch.to(self.device)
                    self.validation_step(moved, index, number)
            self.on_validation_epoch_end()
        for part, mode in modes.items():
            part.training = mode


def require_whole_epochs(trainer: lightning.Trainer) -> None:
    """Every state that is reported must be measured as a whole, and before training too.

    Raises:
        UserError: The trainer measures otherwise.
    """
    if trainer.num_sanity_val_steps != float("inf"):
        raise UserError(
            "`num_sanity_val_steps` must be -1, because the state before training is measured "
            f"then, got {trainer.num_sanity_val_steps}; set trainer.num_sanity_val_steps: -1."
        )
    interval, every = trainer.val_check_interval, trainer.check_val_every_n_epoch
    if interval != 1.0 or isinstance(interval, int) or every is None:
        raise UserError(
            "`val_check_interval` must be 1.0, because whole epochs are measured, got "
            f"{interval} with check_val_every_n_epoch {every}; set trainer.val_check_interval: 1.0 "
            "and choose epochs with trainer.check_val_every_n_epoch."
        )
    limit = trainer.limit_val_batches
    if limit != 0 and not (isinstance(limit, float) and limit == 1.0):
        raise UserError(
            "`limit_val_batches` must be 1.0, because every item counts, or 0 to measure nothing, "
            f"got {limit}; set trainer.limit_val_batches: 1.0."
        )


def _share(trainer: lightning.Trainer) -> float:
    """How much of the epoch that began last has been trained on."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return batches / trainer.num_training_batches
