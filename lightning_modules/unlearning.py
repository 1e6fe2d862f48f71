"""Unlearning by changing weights as a `fit` run, whatever the method."""

from typing import Any, Literal

import lightning
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsg.errors import UserError
from dsg.evaluation import AnyBatch
from dsg.io import read_run_facts, write_run_facts
from dsg.lm import (
    LORA_TARGETS,
    Reference,
    finite_loss,
    load_plain_model,
    make_trainable,
    short_name,
    trainable_weights,
)
from dsg.objectives import Objective, OneShot, ReferenceKind
from dsg.objectives.terms import check_positive
from lightning_modules.parts.distributed import (
    add_tensors_over_ranks,
    exclude_frozen_from_ddp,
    leave_unwrapped,
)
from lightning_modules.parts.measuring import Labels, Measurer
from lightning_modules.parts.precision import use_precision
from lightning_modules.parts.progress import Progress, require_whole_epochs
from lightning_modules.parts.protocols import EVALUATION_DATA, Reads, UnlearningBatch, data_of
from lightning_modules.parts.resuming import check_same_run, described, restore_rng, rng_states
from lightning_modules.parts.saving import keep_trainable, save_model_folder
from lightning_modules.parts.stopwatch import Stopwatch


class UnlearningModule(lightning.LightningModule):
    """Makes a model forget; measures before it and after every epoch.

    The data module's `train_dataloader` yields `UnlearningBatch`es. At the end of `fit` the changed
    model, or the adapter, lies in `<run directory>/model`, and `run.json` tells how long training
    took without the evaluations (`unlearn_seconds`).

    Args:
        model_name: Hugging Face folder or hub name of the model; an adapter is merged first.
        objective: The method.
        reference: What the method compares with, if it needs it: `frozen_copy` of the model, or
            `adapter_off`, a second forward pass through the model under the adapter.
        adapter: `full` trains every weight that the method lets it, `lora` a new adapter.
        lr: Learning rate of AdamW, constant, > 0; `OneShot`s do not descend and read none.
        lora_rank: Rank of the adapter.
        lora_alpha: Scale of the adapter (`lora_alpha / lora_rank` times its output).
        lora_targets: Names of the linear layers that get an adapter.
        experiment: The `experiment` column.
        seed: The `seed` column.
        model_label: The `model` column; None takes the model's name.

    Raises:
        UserError: `lr` is not positive, or objective, reference and adapter do not suit each other.
    """

    reads: Reads = "unlearn"
    keeps_rest: bool = False

    def __init__(
        self,
        model_name: str,
        objective: Objective,
        reference: ReferenceKind = "none",
        adapter: Literal["full", "lora"] = "full",
        lr: float = 1e-5,
        lora_rank: int = 8,
        lora_alpha: float = 16.0,
        lora_targets: list[str] | None = None,
        experiment: str = "unlearning",
        seed: int | None = None,
        model_label: str | None = None,
    ) -> None:
        super().__init__()
        check_positive(lr=lr)
        objective.check_reference(reference, adapter)
        if isinstance(objective, OneShot) and adapter != "full":
            raise UserError(
                f"`adapter` must be 'full' for {type(objective).__name__}, got {adapter!r}: a new "
                "adapter holds no weight that could be dampened; change it."
            )
        self.model_name = model_name
        self.objective = objective
        self.reference_kind: ReferenceKind = reference
        self.adapter: Literal["full", "lora"] = adapter
        self.lr = lr
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.lora_targets = list(lora_targets or LORA_TARGETS)
        self.experiment = experiment
        self.seed = seed
        self.model_label = model_label or short_name(model_name)
        # Every text counts in the sums of a single pass, and no optimizer takes a step.
        self.one_shot = objective if isinstance(objective, OneShot) else None
        self.keeps_rest = self.one_shot is not None
        self.automatic_optimization = self.one_shot is None
        # A checkpoint holds only what training changed.
        self.strict_loading = False
        self.measurer = Measurer()
        self.stopwatch = Stopwatch()
        self.progress = Progress()
        self.model: nn.Module | None = None
        self.reference: Reference | None = None
        self._added: list[Tensor] | None = None
        self._unfinished: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        """Check what will be measured; let a single pass run under DDP, which has no gradients.

        Raises:
            UserError: The trainer's settings do not fit.
        """
        if stage == "fit":
            require_whole_epochs(self.trainer)
        if self.one_shot is None:
            return
        if stage == "fit" and self.trainer.max_epochs != 1:
            raise UserError(
                f"`max_epochs` must be 1 for {type(self.one_shot).__name__}, which reads all texts "
                f"once, got {self.trainer.max_epochs}; set trainer.max_epochs: 1."
            )
        leave_unwrapped(self.trainer.strategy)

    def configure_model(self) -> None:
        """Load the model, choose the weights that train and fix the reference; once."""
        if self.model is not None:
            return
        use_precision(self.trainer)
        model = load_plain_model(self.model_name)
        self.trainer.precision_plugin.convert_module(model)  # before it is copied
        self.model = make_trainable(
            model,
            self.adapter,
            self.lora_rank,
            self.lora_alpha,
            self.lora_targets,
        )
        self.objective.prepare(self.model)
        self.reference = self.objective.make_reference(self.reference_kind, self.model)
        exclude_frozen_from_ddp(self)

    def training_step(self, batch: UnlearningBatch, batch_idx: int) -> Float[Tensor, ""] | None:
        """The loss of a forget and a retain batch; None where it is not descended on."""
        del batch_idx
        assert self.model is not None
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
        self.stopwatch.stop()
        self.progress.measure_end(self, self.measurer.measured_epochs())
        self.stopwatch.stop()

    def on_validation_start(self) -> None:
        """Begin an evaluation of what a training that ends here would leave."""
        self.stopwatch.stop()
        data = data_of(self.trainer, *EVALUATION_DATA)
        self.measurer.start(data, data.val_split, None)
        # The sanity check of a resumed run may make up for an evaluation that was missed.
        if self.objective.changes_at_end and self.progress.epochs(self.trainer) > 0:
            assert self.model is not None
            weights = trainable_weights(self.model)
            self._unfinished = {name: weight.clone() for name, weight in weights.items()}
            self.objective.finish(self.model)

    def validation_step(
        self, batch: AnyBatch | None, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Score a batch."""
        del batch_idx, dataloader_idx
        assert self.model is not None
        self.measurer.update(self.model, batch, None)

    def on_validation_epoch_end(self) -> None:
        """Log and write the results; epoch 0 is the state before unlearning."""
        labels = Labels(
            experiment=self.experiment,
            method=self.objective.name,
            model=self.model_label,
            dataset=data_of(self.trainer, "name").name,
            seed=self.seed,
        )
        epoch, step = self.progress.epochs(self.trainer), self.progress.step(self.trainer)
        self.measurer.finish(self.trainer, labels, stage="val", epoch=epoch, step=step)
        # Before any checkpoint is written: training goes on from where it was.
        with torch.no_grad():
            for name, weight in self._unfinished.items():
                assert self.model is not None
                self.model.get_parameter(name).copy_(weight)
        self._unfinished = {}
        if not self.trainer.sanity_checking:
            self.stopwatch.start()

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """AdamW over the weights that may change; nothing for a single pass."""
        if self.one_shot is not None:
            return None
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        return torch.optim.AdamW(weights, lr=self.lr, weight_decay=0.0)

    def on_fit_start(self) -> None:
        """Catch up when resumed."""
        self.progress.catch_up(self, self.measurer.measured_epochs())

    def on_fit_end(self) -> None:
        """Finish and save the changed model."""
        assert self.model is not None
        self.stopwatch.start()
        self.objective.finish(self.model)
        self.stopwatch.stop()
        save_model_folder(self.trainer, self.model)
        if self.trainer.is_global_zero:
            run_dir = self.trainer.default_root_dir
            facts = {"unlearn_seconds": round(self.stopwatch.seconds, 2)}
            write_run_facts(run_dir, {**read_run_facts(run_dir), **facts})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what unlearning changed and what was measured."""
        keep_trainable(self, checkpoint)
        checkpoint["measurer"] = self.measurer.state()
        checkpoint["unlearn_seconds"] = self.stopwatch.seconds
        checkpoint["settings"] = self._settings()
        checkpoint["epochs"] = self.progress.state(self.trainer)
        checkpoint["rng"] = rng_states()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the interrupted run.

        Raises:
            UserError: The checkpoint is of another run.
        """
        check_same_run(checkpoint, self._settings(), trainable_weights(self).keys())
        self.measurer.load_state(checkpoint["measurer"])
        self.stopwatch = Stopwatch(checkpoint["unlearn_seconds"])
        self.progress.load(checkpoint["epochs"], checkpoint["global_step"])
        restore_rng(checkpoint["rng"])

    def _settings(self) -> dict[str, Any]:
        """What decides the outcome of this run, in plain values."""
        return {
            "model_name": self.model_name,
            "objective": described(self.objective),
            "reference": self.reference_kind,
            "adapter": self.adapter,
            "lr": self.lr,
            "lora": [self.lora_rank, self.lora_alpha, *self.lora_targets],
            "experiment": self.experiment,
            "seed": self.seed,
            "model_label": self.model_label,
        }
