"""Evaluates a model with and without its guard: `test`, and `validate` for choosing settings."""

from typing import Literal

import lightning
from transformers import PreTrainedModel

from dsg.errors import UserError
from dsg.evaluation import AnyBatch
from dsg.guard import Guard, GuardSettings
from dsg.io import read_run_facts, write_run_facts
from dsg.lm import load_model, short_name
from lightning_modules.parts.guards import describe, make_guard, method_of
from lightning_modules.parts.measuring import Labels, Measurer
from lightning_modules.parts.precision import use_precision
from lightning_modules.parts.protocols import EVALUATION_DATA, Reads, Split, data_of


class EvaluationModule(lightning.LightningModule):
    """One method on one model: accuracy, trigger rates, density AUROC, perplexity, alignment.

    Args:
        model_name: Hugging Face folder or hub name of the model.
        guard: How to make the guard, or None to evaluate the model as it is.
        base_model_name: The model against which the alignment score is computed; needed for a model
            whose weights were changed, None for the unguarded model itself.
        method: The `method` column; None takes the guard's, or `base`.
        experiment: The `experiment` column.
        seed: The `seed` column.
        model_label: The `model` column; None takes the model's name.
    """

    reads: Reads = "evaluate"

    def __init__(
        self,
        model_name: str,
        guard: GuardSettings | None = None,
        base_model_name: str | None = None,
        method: str | None = None,
        experiment: str = "evaluation",
        seed: int | None = None,
        model_label: str | None = None,
    ) -> None:
        super().__init__()
        self.model_name = model_name
        self.guard_settings = guard
        self.base_model_name = base_model_name
        self.method = method or ""
        self.experiment = experiment
        self.seed = seed
        self.model_label = model_label or short_name(model_name)
        self.measurer = Measurer()
        self.model: PreTrainedModel | None = None
        self.base_model: PreTrainedModel | None = None
        self.guard: Guard | None = None

    def configure_model(self) -> None:
        """Load the models and make the guard, once."""
        if self.model is not None:
            return
        use_precision(self.trainer)
        self.model = load_model(self.model_name)
        if self.base_model_name is not None:
            self.base_model = load_model(self.base_model_name)
        if self.guard_settings is not None:
            self.guard = make_guard(self.guard_settings, self.model, self.trainer)
        self.method = self.method or method_of(self.guard)

    def setup(self, stage: str) -> None:
        """Refuse data without anything to evaluate, which the Trainer would pass over in silence.

        Raises:
            UserError: There is none.
        """
        data = data_of(self.trainer, *EVALUATION_DATA)
        split = "test" if stage == "test" else data.val_split
        if not any(data.questions(split)) and not any(data.passages(split)):
            raise UserError(
                f"`data` must hold something to evaluate in its {split} split, got nothing; give "
                "more."
            )

    def on_validation_start(self) -> None:
        """Begin an evaluation on the split that the data module validates on."""
        self._start(data_of(self.trainer, *EVALUATION_DATA).val_split)

    def on_test_start(self) -> None:
        """Begin an evaluation on the test split."""
        self._start("test")

    def validation_step(
        self, batch: AnyBatch | None, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Score a batch."""
        del batch_idx, dataloader_idx
        self._step(batch)

    def test_step(self, batch: AnyBatch | None, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch."""
        del batch_idx, dataloader_idx
        self._step(batch)

    def on_validation_epoch_end(self) -> None:
        """Write the results."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Write the results."""
        self._finish("test")

    def _start(self, split: Split) -> None:
        data = data_of(self.trainer, *EVALUATION_DATA)
        self.measurer.baseline = None
        self.measurer.start(data, split, self.guard, self.base_model)

    def _step(self, batch: AnyBatch | None) -> None:
        assert self.model is not None
        self.measurer.update(self.model, batch, self.guard)

    def _finish(self, stage: Literal["val", "test"]) -> None:
        labels = Labels(
            experiment=self.experiment,
            method=self.method,
            model=self.model_label,
            dataset=data_of(self.trainer, "name").name,
            seed=self.seed,
        )
        self.measurer.finish(self.trainer, labels, stage=stage)
        self.measurer.write_items(self.trainer)
        if self.trainer.is_global_zero:
            assert self.model is not None
            run_dir = self.trainer.default_root_dir
            facts = describe(self.model, self.guard)
            write_run_facts(run_dir, {**read_run_facts(run_dir), **facts})
