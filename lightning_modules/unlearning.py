"""Unlearning by changing weights (RMU) as a `fit` run."""

from dataclasses import dataclass
from typing import Any

import lightning
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from dsg.objectives.rmu import RMU
from dsg.scoring import ClozeBatch, PassageBatch
from lightning_modules.distributed import exclude_frozen_from_ddp
from lightning_modules.loading import load_model, short_name
from lightning_modules.measuring import (
    Labels,
    Measurer,
    epochs_done,
    require_full_sanity_check,
)
from lightning_modules.protocols import EVALUATION_DATA, UnlearningBatch, data_of
from lightning_modules.saving import keep_trainable, save_model_folder


@dataclass(frozen=True)
class RMUSettings:
    """How RMU changes a model."""

    hook_point: str
    """Layer whose output is steered, such as `blocks.2.hook_resid_post`."""
    steering: float = 2.0
    """Norm of the control vector, in activation units."""
    alpha: float = 20.0
    """Weight of the retain term."""
    num_layers: int = 3
    """Layers that may change: the hook point's and the ones before it."""
    target: str = "mlp.down_proj"
    """Part of the names of the weights that may change."""
    lr: float = 1e-3
    """Learning rate of AdamW, constant."""
    control_seed: int = 0
    """Seed of the control vector."""

    def objective(self, model: PreTrainedModel) -> RMU:
        """Freeze a model but for these weights and take it as the reference."""
        return RMU(
            model,
            self.hook_point,
            steering=self.steering,
            alpha=self.alpha,
            seed=self.control_seed,
            num_layers=self.num_layers,
            target=self.target,
        )


class UnlearningModule(lightning.LightningModule):
    """Changes a model with RMU; measures before it and after every epoch.

    The data module's `train_dataloader` yields `UnlearningBatch`es. At the end of `fit` the changed
    model lies in `<run directory>/model`.

    Args:
        model_name: Hugging Face folder or hub name of the model.
        rmu: How to change the weights.
        experiment: The `experiment` column.
        seed: The `seed` column.
        model_label: The `model` column; None takes the model's name.
    """

    def __init__(
        self,
        model_name: str,
        rmu: RMUSettings,
        experiment: str = "unlearning",
        seed: int | None = None,
        model_label: str | None = None,
    ) -> None:
        super().__init__()
        self.model_name = model_name
        self.rmu_settings = rmu
        self.experiment = experiment
        self.seed = seed
        self.model_label = model_label or short_name(model_name)
        self.strict_loading = False
        self.measurer = Measurer()
        self.model: PreTrainedModel | None = None
        self.objective: RMU | None = None

    def configure_model(self) -> None:
        """Load the model and fix the reference, once."""
        if self.model is not None:
            return
        self.model = load_model(self.model_name)
        self.objective = self.rmu_settings.objective(self.model)
        exclude_frozen_from_ddp(self)

    def training_step(self, batch: UnlearningBatch, batch_idx: int) -> Float[Tensor, ""]:
        """The RMU loss of a forget and a retain batch."""
        del batch_idx
        assert self.objective is not None
        loss = self.objective(self.model, batch["forget"], batch["retain"])
        size = len(batch["forget"].input_ids)
        parts = {f"train/{name}_loss": value for name, value in loss._asdict().items()}
        self.log_dict(parts, batch_size=size)
        return loss.total

    def on_validation_start(self) -> None:
        """Begin an evaluation."""
        data = data_of(self.trainer, *EVALUATION_DATA)
        self.measurer.start(data, data.val_split, None)

    def validation_step(
        self, batch: ClozeBatch | PassageBatch | None, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Score a batch."""
        del batch_idx, dataloader_idx
        assert self.model is not None
        self.measurer.update(self.model, batch, None)

    def on_validation_epoch_end(self) -> None:
        """Log and write the results; epoch 0 is the state before unlearning."""
        labels = Labels(
            experiment=self.experiment,
            method="rmu",
            model=self.model_label,
            dataset=data_of(self.trainer, "name").name,
            seed=self.seed,
        )
        self.measurer.finish(self.trainer, labels, stage="val", epoch=epochs_done(self.trainer))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the weights that RMU may change."""
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        return torch.optim.AdamW(weights, lr=self.rmu_settings.lr, weight_decay=0.0)

    def on_fit_start(self) -> None:
        """Check that the state before unlearning will be measured."""
        require_full_sanity_check(self.trainer)

    def on_fit_end(self) -> None:
        """Save the changed model."""
        assert self.model is not None
        save_model_folder(self.trainer, self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what unlearning changed and what was measured."""
        keep_trainable(self, checkpoint)
        checkpoint["measurer"] = self.measurer.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the measurements of the interrupted run."""
        self.measurer.load_state(checkpoint["measurer"])
