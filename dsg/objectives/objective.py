"""What every unlearning method is: a loss to descend on, or sums over all texts and one change.

A new method is one file with one class. Its constructor takes hyper-parameters only; models,
references and batches come later.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn

from dsg.errors import UserError, check_choice
from dsg.lm import AdapterOff, FrozenCopy, Reference, TokenBatch
from dsg.objectives.terms import Loss, RetainTerm, check_not_negative, retain_loss, weighted

ReferenceKind = Literal["none", "frozen_copy", "adapter_off"]


class Objective(ABC):
    """A way to change a model's weights so that it forgets: a loss, unless it is a `OneShot`.

    Attributes:
        name: The `method` column of the results; `dsg.evaluation.columns` says how people read it.
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

    def check_reference(self, kind: ReferenceKind, adapter: str) -> None:
        """Refuses a reference that the method or the weights that train cannot work with.

        Args:
            kind: The reference that was chosen.
            adapter: `full` or `lora`.

        Raises:
            UserError: The method needs a reference and there is none, or the adapter is to be
                turned off where there is none.
        """
        check_choice("reference", kind, ("none", "frozen_copy", "adapter_off"))
        if kind == "none" and self.needs_reference:
            wanted = "'frozen_copy'" + (" or 'adapter_off'" if adapter == "lora" else "")
            raise UserError(
                f"`reference` must be {wanted} for {type(self).__name__} with these settings, "
                "which compares with the model before unlearning, got 'none'; choose it."
            )
        if kind == "adapter_off" and adapter != "lora":
            raise UserError(
                f"`reference` 'adapter_off' needs adapter 'lora', got adapter {adapter!r}; choose "
                "'frozen_copy'."
            )

    def make_reference(self, kind: ReferenceKind, model: nn.Module) -> Reference | None:
        """The chosen reference; None for a method that needs none.

        Args:
            kind: The reference that was chosen.
            model: The model before unlearning, with its adapter if it gets one.
        """
        if not self.needs_reference:
            return None
        return AdapterOff(model) if kind == "adapter_off" else FrozenCopy(model)


class WeightedObjective(Objective):
    """gamma * forget term + alpha * retain term.

    Args:
        alpha: Weight of the retain term, >= 0.
        gamma: Weight of the forget term, >= 0.
        retain: `nll` descends on retain text, `kl` holds its next-token distributions where the
            reference has them, `none` runs none.

    Raises:
        UserError: A weight is negative, or `retain` is unknown.
    """

    def __init__(
        self, *, alpha: float = 1.0, gamma: float = 1.0, retain: RetainTerm = "nll"
    ) -> None:
        check_not_negative(alpha=alpha, gamma=gamma)
        check_choice("retain", retain, ("none", "nll", "kl"))
        self.alpha = alpha
        self.gamma = gamma
        self.retain: RetainTerm = retain
        self.needs_reference = self.needs_reference or retain == "kl"

    @abstractmethod
    def forget_term(
        self, model: nn.Module, forget: TokenBatch, reference: Reference | None
    ) -> Float[Tensor, ""]:
        """What is minimised on a forget batch."""

    def __call__(
        self,
        model: nn.Module,
        forget: TokenBatch,
        retain: TokenBatch,
        *,
        reference: Reference | None = None,
        step: int | None = None,
    ) -> Loss:
        """The loss on a forget and a retain batch."""
        del step
        forget_loss = self.forget_term(model, forget, reference)
        kept = retain_loss(self.retain, model, retain, reference)
        return weighted(forget_loss, kept, self.gamma, self.alpha)


class OneShot(Objective):
    """A method without gradient descent: sums over all texts, then one change by `finish`."""

    changes_at_end: ClassVar[bool] = True

    @abstractmethod
    def sums(self) -> list[Tensor]:
        """The sums over the batches so far, changed in place by whoever adds to them."""

    @abstractmethod
    def measure(
        self, model: nn.Module, forget: TokenBatch, retain: TokenBatch
    ) -> tuple[list[Tensor], Loss]:
        """What a forget and a retain batch add to `sums`, and a loss to log."""

    def __call__(
        self,
        model: nn.Module,
        forget: TokenBatch,
        retain: TokenBatch,
        *,
        reference: Reference | None = None,
        step: int | None = None,
    ) -> Loss:
        """Add a batch to the sums; the loss is logged, not descended on."""
        del reference, step
        added, loss = self.measure(model, forget, retain)
        for total, part in zip(self.sums(), added, strict=True):
            total.add_(part.to(total.device))
        return loss
