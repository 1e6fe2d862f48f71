"""A model that has diverged has not forgotten: numbers that are not finite end a run."""

from jaxtyping import Float
from torch import Tensor, nn
from transformers import LogitsProcessor

from dsg.errors import UserError


def finite_loss(loss: Float[Tensor, ""], step: int) -> Float[Tensor, ""]:
    """The loss of a training step, which must be a number.

    Args:
        loss: Of the step, on any device.
        step: Optimizer steps taken so far, for the message.

    Raises:
        UserError: It is nan or infinite.
    """
    if not loss.isfinite():
        raise UserError(
            f"the training loss must be finite, got {loss.item()} after {step} optimizer steps: "
            "training has diverged; lower `lr`, or clip gradients (trainer.gradient_clip_val)."
        )
    return loss


def check_log_probs(log_probs: Float[Tensor, "..."]) -> None:
    """Refuses log-probabilities of tokens, or sums of them, that are no numbers.

    Only tokens that are scored may be among them: those that a model masks have none.

    Raises:
        UserError: One is nan or infinite.
    """
    if not log_probs.isfinite().all():
        raise _diverged("log-probabilities")


def check_weights(model: nn.Module) -> None:
    """Refuses a model with a weight that is no number.

    Raises:
        UserError: One is nan or infinite.
    """
    for name, weight in model.named_parameters():
        if not weight.detach().isfinite().all():
            raise UserError(
                f"the trained weights must be finite, got nan or inf in {name}: training has "
                "diverged; lower `lr`, or clip gradients (trainer.gradient_clip_val)."
            )


class FiniteLogits(LogitsProcessor):
    """Watches the logits from which tokens are generated, and leaves them alone."""

    def __init__(self) -> None:
        self._highest: Tensor | None = None

    def __call__(
        self, input_ids: Tensor, scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """The logits as they came."""
        del input_ids
        # The highest shows each nan and inf, but no -inf, by which tokens are masked. Kept where
        # it is, so that nobody has to wait for the device at every token.
        highest = scores.amax(dim=-1).abs().amax()
        self._highest = highest if self._highest is None else self._highest.maximum(highest)
        return scores

    def check(self) -> None:
        """Refuses a continuation that was generated from anything but numbers.

        Raises:
            UserError: A logit was nan or infinite.
        """
        if self._highest is not None and not self._highest.isfinite():
            raise _diverged("logits")


def _diverged(what: str) -> UserError:
    return UserError(
        f"the model's {what} must be finite, got nan or inf: its weights are damaged, or were "
        "trained until they diverged; use whole weights, or train again with a lower `lr`."
    )
