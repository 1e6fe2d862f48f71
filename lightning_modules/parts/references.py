"""The frozen reference of an unlearning run, chosen explicitly."""

from typing import Literal

from torch import nn

from dsg.errors import UserError, check_choice
from dsg.lm import AdapterOff, FrozenCopy, Reference
from dsg.objectives.objective import Objective

ReferenceKind = Literal["none", "frozen_copy", "adapter_off"]


def check_reference(kind: ReferenceKind, objective: Objective, adapter: str) -> None:
    """Refuses a choice that an objective or the weights that train cannot work with.

    Args:
        kind: What was chosen.
        objective: What may need it.
        adapter: `full` or `lora`.

    Raises:
        UserError: The objective needs a reference and there is none, or the adapter is to be turned
            off where there is none.
    """
    check_choice("reference", kind, ("none", "frozen_copy", "adapter_off"))
    if kind == "none" and objective.needs_reference:
        wanted = "'frozen_copy'" + (" or 'adapter_off'" if adapter == "lora" else "")
        raise UserError(
            f"`reference` must be {wanted} for {type(objective).__name__} with these settings, "
            "which compares with the model before unlearning, got 'none'; choose it."
        )
    if kind == "adapter_off" and adapter != "lora":
        raise UserError(
            f"`reference` 'adapter_off' needs adapter 'lora', got adapter {adapter!r}; choose "
            "'frozen_copy'."
        )


def make_reference(kind: ReferenceKind, objective: Objective, model: nn.Module) -> Reference | None:
    """The reference that was chosen; none is made for an objective that needs none.

    Args:
        kind: What was chosen.
        objective: What may need it.
        model: The model before unlearning, with its adapter if it gets one.
    """
    if not objective.needs_reference:
        return None
    return AdapterOff(model) if kind == "adapter_off" else FrozenCopy(model)
