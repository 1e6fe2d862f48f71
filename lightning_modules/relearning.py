"""Relearning attack as a `fit` run: an attacker fine-tunes the model to get the knowledge back."""

from dataclasses import asdict
from typing import Any, Literal

import lightning
import torch
from jaxtyping import Float
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedModel

from dsg.attacks import Attacker, Drift, Task
from dsg.errors import UserError
from dsg.evaluation import AnyBatch, PassageBatch
from dsg.guard import Guard, GuardSettings, guarded
from dsg.lm import (
    LORA_TARGETS,
    TokenBatch,
    finite_loss,
    load_model,
    load_plain_model,
    make_trainable,
    short_name,
    trainable_weights,
    unwrap,
)
from lightning_modules.parts.distributed import exclude_frozen_from_ddp
from lightning_modules.parts.guards import make_guard, method_of, remaking_settings
from lightning_modules.parts.measuring import Labels, Measurer
from lightning_modules.parts.precision import use_precision
from lightning_modules.parts.progress import Progress, require_whole_epochs
from lightning_modules.parts.protocols import EVALUATION_DATA, Reads, data_of, val_loaders
from lightning_modules.parts.resuming import check_same_run, restore_rng, rng_states
from lightning_modules.parts.saving import keep_trainable


class RelearningModule(lightning.LightningModule):
    """Fine-tunes a model on the attacker's text; measures before it and after every epoch.

    The data module's `train_dataloader` yields `TokenBatch`es. The guard, if any, is made from the
    raw model before the attack and is then fixed. Every evaluation scores the model with the guard
    off (whoever holds the weights can remove it) and on (the model is served behind an interface),
    and how far the activations at the hook point have drifted.

    A checkpoint holds what the attack changed; `validate` with one evaluates the attacked model, an
    adapter unmerged.

    Args:
        model_name: Hugging Face folder or hub name of the model to attack; an adapter is merged.
        guard: How to make the guard; None only with mode `none`.
        mode: `test_time`: the attacker trains the raw model. `train_time`: the guard is in the
            forward pass during training too. `none`: there is no guard.
        attacker: What the attacker minimises; None is next-token cross-entropy.
        maintenance: After every epoch also select features and calibrate anew on the attacked
            model, with the guard's settings, and report that guard beside the fixed one, as method
            `<method>_maintained`.
        adapter: `full` trains every weight, `lora` a new adapter.
        lr: Learning rate of AdamW, constant, above 0.
        weight_decay: Decoupled weight decay.
        lora_rank: Rank of the adapter.
        lora_alpha: Scale of the adapter (`lora_alpha / lora_rank` times its output).
        lora_targets: Names of the linear layers that get an adapter.
        base_model_name: The model against which the alignment score is computed; needed if the
            attacked model's weights were changed to forget, None for the attacked model itself.
        hook_point: Where drift is measured; None takes the guard's. Without a guard either nothing
            is measured.
        method: The `method` column; None takes the guard's, or `base`.
        experiment: The `experiment` column.
        seed: The `seed` column.
        model_label: The `model` column; None takes the model's name.

    Raises:
        UserError: `mode` and `guard` contradict each other, what needs a guard has none, or `lr` is
            not above 0.
    """

    reads: Reads = "relearn"
    keeps_rest: bool = False

    def __init__(
        self,
        model_name: str,
        guard: GuardSettings | None = None,
        mode: Literal["none", "test_time", "train_time"] = "none",
        attacker: Attacker | None = None,
        maintenance: bool = False,
        adapter: Literal["full", "lora"] = "full",
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        lora_rank: int = 8,
        lora_alpha: float = 16.0,
        lora_targets: list[str] | None = None,
        base_model_name: str | None = None,
        hook_point: str | None = None,
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
        self.attacker = attacker or Task()
        for option, needs_guard in (
            ("attacker", self.attacker.needs_guard),
            ("maintenance", maintenance),
        ):
            if needs_guard and guard is None:
                raise UserError(
                    f"`guard` must be given for this `{option}`, got None; add one, or leave "
                    f"`{option}` out."
                )
        if not 0.0 < lr < float("inf"):
            raise UserError(f"`lr` must be finite and above 0, got {lr}; try 2e-4.")
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
        self.maintenance = maintenance
        self.hook_point = hook_point or (guard.hook_point if guard else None)
        self.method = method or ""
        self.experiment = experiment
        self.seed = seed
        self.model_label = model_label or short_name(model_name)
        # A checkpoint holds only what the attack changed.
        self.strict_loading = False
        self.measurer = Measurer()
        self.model: torch.nn.Module | None = None
        self.base_model: PreTrainedModel | None = None
        self.guard: Guard | None = None
        self.drift: Drift | None = None
        self._remaking: GuardSettings | None = None
        self.progress = Progress()

    def setup(self, stage: str) -> None:
        """Check that the states before and after the attack will be measured."""
        if stage == "fit":
            require_whole_epochs(self.trainer)

    def configure_model(self) -> None:
        """Load the model, make the guard from it, and only then prepare the attack; once."""
        if self.model is not None:
            return
        use_precision(self.trainer)
        model = load_plain_model(self.model_name)
        self.trainer.precision_plugin.convert_module(model)
        if self.base_model_name is not None:
            self.base_model = load_model(self.base_model_name)
        if self.guard_settings is not None:
            self.guard = make_guard(self.guard_settings, model, self.trainer)
            if self.maintenance:
                self._remaking = remaking_settings(self.guard_settings, self.guard)
        self.method = self.method or method_of(self.guard)
        if self.hook_point is not None:
            self.drift = self._remember(model, self.hook_point)
        self.model = make_trainable(
            model, self.adapter, self.lora_rank, self.lora_alpha, self.lora_targets
        )
        exclude_frozen_from_ddp(self)

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Float[Tensor, ""]:
        """The attacker's loss."""
        del batch_idx
        assert self.model is not None
        in_loop = self.guard if self.mode == "train_time" else None
        with guarded(unwrap(self.model), in_loop) as forward:
            loss = self.attacker(forward, batch, self.guard)
        finite_loss(loss.total, self.global_step)
        size = len(batch.input_ids)
        self.log("train/loss", loss.total, prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": part for name, part in loss.parts.items()}, batch_size=size)
        return loss.total

    def on_validation_start(self) -> None:
        """Begin an evaluation."""
        data = data_of(self.trainer, *EVALUATION_DATA)
        base_model = self.base_model if self.measurer.baseline is None else None
        self.measurer.start(
            data,
            data.val_split,
            self.guard,
            base_model,
            further=self._maintained(),
            drift=self.drift,
        )

    def validation_step(
        self, batch: AnyBatch | None, batch_idx: int, dataloader_idx: int = 0
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
            attack=self._attack_name(),
            seed=self.seed,
        )
        epoch, step = self.progress.epochs(self.trainer), self.progress.step(self.trainer)
        self.measurer.finish(self.trainer, labels, stage="val", epoch=epoch, step=step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over what the attacker may change."""
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        return torch.optim.AdamW(weights, lr=self.lr, weight_decay=self.weight_decay)

    def on_fit_start(self) -> None:
        """Catch up when resumed."""
        self.progress.catch_up(self, self.measurer.measured_epochs())

    def on_train_end(self) -> None:
        """Measure an attack that ends within an epoch."""
        self.progress.measure_end(self, self.measurer.measured_epochs())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the attack changed and what was measured."""
        keep_trainable(self, checkpoint)
        checkpoint["measurer"] = self.measurer.state()
        checkpoint["settings"] = self._settings()
        checkpoint["epochs"] = self.progress.state(self.trainer)
        checkpoint["rng"] = rng_states()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the interrupted run, or evaluate the model that a checkpoint holds.

        Raises:
            UserError: The checkpoint is of another run.
        """
        check_same_run(checkpoint, self._settings(), trainable_weights(self).keys())
        self.progress.load(checkpoint["epochs"], checkpoint["global_step"])
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.measurer.load_state(checkpoint["measurer"])
            restore_rng(checkpoint["rng"])
        else:
            self.measurer.baseline = checkpoint["measurer"]["baseline"]

    def _remember(self, model: PreTrainedModel, hook_point: str) -> Drift:
        """The activations before the attack; now, because a checkpoint is loaded hereafter."""
        drift = Drift(hook_point)
        data = data_of(self.trainer, *EVALUATION_DATA)
        for loader in val_loaders(data):
            for batch in loader:
                if not isinstance(batch, PassageBatch):
                    break
                drift.remember(model, batch)
        return drift

    def _maintained(self) -> dict[str, Guard]:
        """The guard made anew from the attacked model; before the attack it is the fixed one."""
        if self._remaking is None or self.guard is None:
            return {}
        if self.progress.epochs(self.trainer) == 0:
            return {"maintained": self.guard}
        assert self.model is not None
        guard = make_guard(self._remaking, unwrap(self.model), self.trainer)
        return {"maintained": guard.to(self.device)}

    def _attack_name(self) -> str:
        """The `attack` column: the ordinary attack's text and objective go without saying."""
        text = getattr(data_of(self.trainer), "attack_text", "forget")
        parts = ("relearn", self.adapter, "" if text == "forget" else text, self.attacker.name)
        return "_".join(part for part in parts if part)

    def _settings(self) -> dict[str, Any]:
        """What decides the outcome of this run, in plain values."""
        attacker = type(self.attacker)
        return {
            "model_name": self.model_name,
            "guard": asdict(self.guard_settings) if self.guard_settings else None,
            "mode": self.mode,
            "attacker": [f"{attacker.__module__}.{attacker.__qualname__}", vars(self.attacker)],
            "maintenance": self.maintenance,
            "adapter": self.adapter,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "lora": [self.lora_rank, self.lora_alpha, *self.lora_targets],
            "base_model_name": self.base_model_name,
            "hook_point": self.hook_point,
            "method": self.method,
            "experiment": self.experiment,
            "seed": self.seed,
            "model_label": self.model_label,
        }
