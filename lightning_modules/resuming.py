"""What a checkpoint needs beside weights, so that a resumed run ends as if never interrupted."""

import random
from collections.abc import Collection, Mapping
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from dsg.errors import UserError
from lightning_modules.measuring import epochs_done
from lightning_modules.protocols import data_of, val_loaders


def rng_states() -> dict[str, Any]:
    """The states of all random number generators, made of plain values and tensors."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_rng(states: Mapping[str, Any]) -> None:
    """Undo `rng_states`; generators of a GPU that is missing now are left out."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])


class Progress:
    """Epochs behind a module's weights, and the evaluation that an interruption swallowed.

    After a checkpoint of an epoch's last batch Lightning goes on with the next epoch, so that the
    evaluation which was to follow that batch would never take place.
    """

    def __init__(self) -> None:
        self._loaded: float | None = None

    def state(self, trainer: lightning.Trainer) -> float:
        """What a checkpoint keeps: epochs so far, with the share of the one that is under way."""
        in_epoch = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return trainer.current_epoch + in_epoch / trainer.num_training_batches

    def load(self, state: float) -> None:
        """Undo `state`."""
        self._loaded = state

    def epochs(self, trainer: lightning.Trainer) -> float:
        """Epochs behind the weights: those of a checkpoint just loaded, if any."""
        return epochs_done(trainer) if self._loaded is None else self._loaded

    def catch_up(self, module: lightning.LightningModule, measured: Collection[Any]) -> None:
        """Evaluate what a checkpoint of an epoch's last batch holds; for the beginning of `fit`.

        Args:
            module: The module, on its device, with the weights of the checkpoint, if there is one.
            measured: Epochs that have been evaluated.
        """
        epochs = self._loaded
        if epochs is not None and float(epochs).is_integer() and epochs not in measured:
            with isolate_rng():
                module.on_validation_start()
                for number, loader in enumerate(val_loaders(data_of(module.trainer))):
                    for index, batch in enumerate(loader):
                        moved = batch if batch is None else batch.to(module.device)
                        module.validation_step(moved, index, number)
                module.on_validation_epoch_end()
        self._loaded = None


def check_same_run(
    checkpoint: Mapping[str, Any], settings: Mapping[str, Any], trained: Collection[str]
) -> None:
    """Refuses a checkpoint of another run.

    Args:
        checkpoint: What was saved; its entry `settings` holds those of its run.
        settings: What decides this run, in plain values.
        trained: Names of the weights that this run trains.

    Raises:
        UserError: Settings or trained weights differ.
    """
    saved = checkpoint.get("settings")
    if not isinstance(saved, Mapping):
        raise UserError(
            "the checkpoint must have been written by this kind of run, but it says nothing of its "
            "settings; give the checkpoint of this run or start again with --overwrite."
        )
    for name in sorted({*saved, *settings}):
        if saved.get(name) != settings.get(name):
            raise UserError(
                f"the checkpoint must be of this run, but `{name}` was {saved.get(name)!r} there "
                f"and is {settings.get(name)!r} here; give the same settings or start again with "
                "--overwrite."
            )
    if set(checkpoint["state_dict"]) != set(trained):
        raise UserError(
            f"the checkpoint must hold the {len(trained)} weights that this run trains, got "
            f"{len(checkpoint['state_dict'])} others or some of them; start again with --overwrite."
        )
