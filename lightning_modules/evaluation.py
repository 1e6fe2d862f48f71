"""Evaluates a model with and without its guard: `test`, and `validate` for choosing settings."""

from typing import Any, Literal

from dsg.errors import UserError
from dsg.guard import GuardSettings
from dsg.lm import load_model
from lightning_modules.parts.measuring import Measured
from lightning_modules.parts.protocols import EVALUATION_DATA, Split, data_of


class EvaluationModule(Measured):
    """One method on one model: accuracy, trigger rates, density AUROC, perplexity, alignment.

    Args:
        model_name: Hugging Face folder or hub name of the model.
        guard: How to make the guard, or None to evaluate the model as it is.
        base_model_name: The model against which the alignment score is computed; needed for a model
            whose weights were changed, None for the unguarded model itself.
        labels: Those of `Run`.
    """

    kind = "evaluation"

    def __init__(
        self,
        model_name: str,
        guard: GuardSettings | None = None,
        base_model_name: str | None = None,
        **labels: Any,
    ) -> None:
        super().__init__(model_name, guard, **labels)
        self.base_model_name = base_model_name

    def configure_model(self) -> None:
        """Load the models and make the guard, once."""
        super().configure_model()
        if self.base_model_name is not None and self.base_model is None:
            self.base_model = load_model(self.base_model_name)

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

    test_step = Measured.validation_step

    def on_test_start(self) -> None:
        """Begin an evaluation on the test split."""
        self.begin("test")

    def on_test_epoch_end(self) -> None:
        """Write the results."""
        self.finish("test")

    def begin(self, split: Split, **options: Any) -> None:
        """Begin an evaluation, without what an earlier one has measured."""
        self.measurer.baseline = None
        super().begin(split, base_model=self.base_model, **options)

    def finish(self, stage: Literal["val", "test"], step: int = 0, **options: Any) -> None:
        """Write the results, the values of every item, and what was evaluated."""
        super().finish(stage, step, **options)
        self.measurer.write_items(self.trainer)
        self.add_facts(self.describe())
