"""What every unlearning method is: a loss over a forget and a retain batch, named in YAML.

A new method is one file with one class. Its constructor takes hyper-parameters only; models,
references and batches come later.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import nn

from dsg.lm import Reference, TokenBatch
from dsg.objectives.terms import Loss


class Objective(ABC):
    """A way to change a model's weights so that it forgets.

    Attributes:
        name: The `method` column of the results.
        needs_reference: Whether the loss compares with the model before unlearning.
        changes_at_end: Whether `finish` does anything.
    """

    name: ClassVar[str]
    needs_reference: bool = False
    changes_at_end: ClassVar[bool] = False

    def prepare(self, model: nn.Module) -> None:  # noqa: B027
        """Called once with the original model, whose weights that may train require gradients.

        Here a method freezes more of them, or keeps what it needs of the original.

        Args:
            model: A causal LM, or a PEFT model around one.
        """

    @abstractmethod
    def __call__(
        self,
        model: nn.Module,
        forget: TokenBatch,
        retain: TokenBatch,
        *,
        reference: Reference | None = None,
        step: int | None = None,
    ) -> Loss:
        """The loss on a forget and a retain batch.

        Args:
            model: The model that is trained.
            forget: Text to forget.
            retain: Text to keep.
            reference: The model before unlearning; required if `needs_reference`.
            step: Optimizer steps taken so far; None where nobody counts them.

        Raises:
            UserError: There is no reference and one is needed.
        """

    def finish(self, model: nn.Module) -> None:  # noqa: B027
        """Called with the trained model, which becomes the unlearned one.

        Every evaluation calls it too and then takes the change back, so that it measures what a
        training that ends there would leave.

        Args:
            model: The model that `prepare` was called with.
        """
