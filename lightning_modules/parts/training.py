"""Training whose checkpoints hold what it changed, and all that a resumed run needs beside it."""

import inspect
import random
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, Literal

import lightning
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.parsing import save_hyperparameters
from torch import nn
from transformers import PreTrainedModel

from dsg.errors import UserError
from dsg.lm import LORA_TARGETS, load_plain_model, make_trainable, trainable_weights
from dsg.objectives.terms import check_positive
from lightning_modules.parts.distributed import exclude_frozen_from_ddp
from lightning_modules.parts.precision import use_precision
from lightning_modules.parts.protocols import Reads


class Trained(lightning.LightningModule):
    """A `fit` run that ends as if never interrupted; its learning rate is constant.

    A checkpoint holds the weights that training can have changed, the arguments of the module and
    the states of all random number generators. A resumed run must have the same arguments.
    """

    model: nn.Module
    model_name: str
    lr: float
    weight_decay: float = 0.0
    reads: Reads
    keeps_rest: bool = False
    """Whether training needs every batch, so that some ranks get None in the last step."""

    def __init__(self, **further: Any) -> None:
        super().__init__(**further)
        # The arguments as they came, not as `dsg` declared them: both then make equal checkpoints.
        save_hyperparameters(self, frame=inspect.currentframe())
        # A checkpoint holds only what training changed.
        self.strict_loading = False

    def configure_model(self) -> None:
        """Load the model and choose the weights that train, once."""
        if self.model is not None:
            return
        use_precision(self.trainer)
        model = load_plain_model(self.model_name)
        # Now, because it may be copied, or a guard be made from it, before Lightning converts it.
        self.trainer.precision_plugin.convert_module(model)
        self.model = self.prepare(model)
        exclude_frozen_from_ddp(self)

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """The model to train, made of the original one; what is not to train is frozen."""
        raise NotImplementedError

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """AdamW over the weights that train; nothing where no step is taken."""
        if not self.automatic_optimization:
            return None
        weights = list(trainable_weights(self).values())
        return torch.optim.AdamW(weights, lr=self.lr, weight_decay=self.weight_decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop what training cannot have changed; keep arguments and generators."""
        super().on_save_checkpoint(checkpoint)
        trained, weights = trainable_weights(self), checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: weights[name] for name in weights if name in trained}
        # Lightning's own entry holds objects, which are not loaded from a file.
        checkpoint.pop(self.CHECKPOINT_HYPER_PARAMS_KEY, None)
        checkpoint["settings"] = plain_values(dict(self.hparams))
        checkpoint["rng"] = rng_states()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the interrupted run, or evaluate the model that a checkpoint holds.

        Raises:
            UserError: The checkpoint is of another run.
        """
        self._check_same_run(checkpoint)
        super().on_load_checkpoint(checkpoint)
        if self.trainer.state.fn == TrainerFn.FITTING:
            restore_rng(checkpoint["rng"])

    def _check_same_run(self, checkpoint: Mapping[str, Any]) -> None:
        saved, settings = checkpoint.get("settings"), plain_values(dict(self.hparams))
        if not isinstance(saved, Mapping):
            raise UserError(
                "the checkpoint must have been written by this kind of run, but it says nothing of "
                "its settings; give the checkpoint of this run or start again with --overwrite."
            )
        for name in sorted({*saved, *settings}):
            if saved.get(name) != settings.get(name):
                raise UserError(
                    f"the checkpoint must be of this run, but `{name}` was {saved.get(name)!r} "
                    f"there and is {settings.get(name)!r} here; give the same settings or start "
                    "again with --overwrite."
                )
        trained, weights = trainable_weights(self), checkpoint["state_dict"]
        if set(weights) != set(trained):
            raise UserError(
                f"the checkpoint must hold the {len(trained)} weights that this run trains, got "
                f"{len(weights)} others or some of them; start again with --overwrite."
            )


class Trainable(Trained):
    """Training of all weights, or of a new LoRA adapter.

    Args:
        adapter: `full` trains every weight that may change, `lora` a new adapter, which stays
            unmerged.
        lr: Learning rate of AdamW, above 0.
        weight_decay: Decoupled weight decay.
        lora_rank: Rank of the adapter.
        lora_alpha: Scale of the adapter (`lora_alpha / lora_rank` times its output).
        lora_targets: Names of the linear layers that get an adapter.

    Raises:
        UserError: `lr` is not positive.
    """

    def __init__(
        self,
        adapter: Literal["full", "lora"] = "full",
        lr: float = 1e-5,
        weight_decay: float = 0.0,
        lora_rank: int = 8,
        lora_alpha: float = 16.0,
        lora_targets: list[str] | None = None,
        **further: Any,
    ) -> None:
        super().__init__(**further)
        check_positive(lr=lr)
        self.adapter: Literal["full", "lora"] = adapter
        self.lr = lr
        self.weight_decay = weight_decay
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.lora_targets = list(lora_targets or LORA_TARGETS)

    def make_trainable(self, model: nn.Module) -> nn.Module:
        """The model to train, made of a plain one; see `dsg.lm.make_trainable`."""
        return make_trainable(
            model, self.adapter, self.lora_rank, self.lora_alpha, self.lora_targets
        )


def plain_values(value: Any) -> Any:
    """Arguments as values that a checkpoint can hold; a method by its class and its settings."""
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if isinstance(value, Mapping):
        return {name: plain_values(item) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return plain_values(asdict(value))
    settings = {
        name: setting
        for name, setting in vars(value).items()
        if isinstance(setting, str | int | float | None)
    }
    return [f"{type(value).__module__}.{type(value).__qualname__}", settings]


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
