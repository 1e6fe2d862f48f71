"""The frozen reference that an unlearning objective compares the changing model with.

One of two, chosen explicitly: the same model with its adapter off (no second set of weights, only
right where the adapter is all that unlearning changes), or a frozen copy. Neither is a module, so
that no parent registers it: it appears in no state dict, optimizer or checkpoint.
"""

import copy
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsg.errors import UserError
from dsg.lm.hooks import Adapted, evaluating, unwrap
from dsg.lm.tokens import TokenBatch


@runtime_checkable
class Reference(Protocol):
    """A model that stays what it was."""

    def logits(self, batch: TokenBatch) -> Float[Tensor, "batch seq vocab"]:
        """Logits without gradients, in evaluation mode (dropout off)."""
        ...


class AdapterOff:
    """The model under the adapter: a second forward pass with the adapter disabled.

    Args:
        model: A PEFT model with exactly one adapter, nothing else of which is trained.

    Raises:
        UserError: `model` has no adapter or several, or weights outside the adapter require
            gradients, so that the model under the adapter would move too.
    """

    def __init__(self, model: nn.Module) -> None:
        adapters = list(model.peft_config) if isinstance(model, Adapted) else []
        if len(adapters) != 1:
            raise UserError(
                "`model` must be a PEFT model with one adapter for a reference with the adapter "
                f"off, got {type(model).__name__} with {len(adapters)}; merge earlier adapters "
                "into the weights, or choose a frozen copy."
            )
        moving = [
            name
            for name, weight in model.named_parameters()
            if weight.requires_grad and adapters[0] not in name.split(".")
        ]
        if moving:
            raise UserError(
                "only the adapter may be trained for a reference with the adapter off, but "
                f"{moving[0]!r} requires gradients; freeze it, or choose a frozen copy."
            )
        self._model: Any = model

    def logits(self, batch: TokenBatch) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the model under the adapter; modes and frozen weights stay as they were."""
        frozen = [weight for weight in self._model.parameters() if not weight.requires_grad]
        try:
            with torch.no_grad(), evaluating(self._model), self._model.disable_adapter():
                return self._model(**batch.model_inputs(), use_cache=False).logits
        finally:
            # PEFT makes every adapter weight trainable when it turns the adapter on again.
            for weight in frozen:
                weight.requires_grad_(False)


class FrozenCopy:
    """A deep copy of the model as it is now, which doubles the memory for weights.

    Args:
        model: The causal LM, wrapped or not, without a guard attached. An adapter that it carries
            is copied too and stays on.

    Raises:
        UserError: There is no Hugging Face model inside.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = copy.deepcopy(unwrap(model)).eval().requires_grad_(False)

    @torch.no_grad()
    def logits(self, batch: TokenBatch) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the copy, which follows the batch to its device."""
        # Nothing else moves it: a Trainer only moves what is registered.
        if self._model.device != batch.input_ids.device:
            self._model.to(batch.input_ids.device)
        return self._model(**batch.model_inputs(), use_cache=False).logits
