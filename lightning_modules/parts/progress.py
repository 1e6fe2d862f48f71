"""How far a `fit` run has come, and evaluations where Lightning takes none."""

from collections.abc import Collection
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from dsg.errors import UserError
from lightning_modules.parts.protocols import data_of, val_loaders


class Progress:
    """Epochs behind a module's weights, and the evaluations that Lightning leaves out.

    It evaluates after whole epochs only, so a run that ends within one would never tell what it
    leaves. After a checkpoint of an epoch's last batch it goes on with the next epoch, so the
    evaluation which was to follow that batch would never take place.
    """

    def __init__(self) -> None:
        self._at: tuple[float, int] | None = None

    def state(self, trainer: lightning.Trainer) -> float:
        """What a checkpoint keeps: epochs so far, with the share of the one that is under way."""
        return trainer.current_epoch + _share(trainer)

    def load(self, epochs: float, step: int) -> None:
        """Note what a checkpoint says of its weights."""
        self._at = (_rounded(epochs), step)

    def epochs(self, trainer: lightning.Trainer) -> float:
        """Epochs behind the weights: those of a checkpoint just loaded, if any."""
        if self._at is not None:
            return self._at[0]
        return 0 if trainer.sanity_checking else trainer.current_epoch + 1

    def step(self, trainer: lightning.Trainer) -> int:
        """Optimizer steps behind the weights."""
        return trainer.global_step if self._at is None else self._at[1]

    def catch_up(self, module: lightning.LightningModule, measured: Collection[Any]) -> None:
        """Evaluate what a checkpoint holds that was to be evaluated; for the beginning of `fit`.

        Args:
            module: The module, on its device, with the weights of the checkpoint, if there is one.
            measured: Epochs that have been evaluated.
        """
        if self._at is not None:
            epochs, step = self._at
            was_end = 0 < module.trainer.max_steps <= step
            if (float(epochs).is_integer() or was_end) and epochs not in measured:
                _evaluate(module)
        self._at = None

    def measure_end(self, module: lightning.LightningModule, measured: Collection[Any]) -> None:
        """Evaluate what training leaves, unless that has been done; for the end of training."""
        trainer = module.trainer
        if trainer.limit_val_batches == 0:
            return
        # The epoch that ends here counts as complete even if `max_steps` cut it short.
        epochs = _rounded(trainer.current_epoch - 1 + _share(trainer))
        if epochs not in measured:
            self._at = (epochs, trainer.global_step)
            _evaluate(module)
            self._at = None


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


def _rounded(epochs: float) -> float:
    return round(epochs, 4)


def _evaluate(module: lightning.LightningModule) -> None:
    """What Lightning does in an evaluation, without touching generators or any module's mode."""
    trainer = module.trainer
    modes = {part: part.training for part in module.modules()}
    module.eval()
    with isolate_rng(), torch.no_grad(), trainer.precision_plugin.val_step_context():
        module.on_validation_start()
        for number, loader in enumerate(val_loaders(data_of(trainer))):
            for index, batch in enumerate(loader):
                moved = batch if batch is None else batch.to(module.device)
                module.validation_step(moved, index, number)
        module.on_validation_epoch_end()
    for part, mode in modes.items():
        part.training = mode
