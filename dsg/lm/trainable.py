"""Relearning attacks: which weights an attacker who fine-tunes the model may change."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dsg.errors import UserError
from dsg.lm.hooks import unwrap

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_trainable(
    model: nn.Module,
    kind: Literal["full", "lora"],
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] = LORA_TARGETS,
) -> nn.Module:
    """Make a model ready for fine-tuning.

    Args:
        model: A plain Hugging Face causal LM.
        kind: `full` trains every weight; `lora` freezes them all and trains a new adapter, which
            stays unmerged, because merging rounds the weights.
        rank: Of the adapter.
        alpha: Scale of the adapter, whose output is multiplied by `alpha / rank`.
        targets: Names of the linear layers that get an adapter.

    Returns:
        The model to train: `model` itself for `full`, a PEFT model around it for `lora`. What an
        optimizer may change requires gradients, nothing else does.

    Raises:
        UserError: The model already carries an adapter, `kind` is unknown, the rank is below 1, or
            a target matches no layer.
    """
    # PEFT leaves its configuration on the model inside.
    if unwrap(model) is not model or "peft_config" in vars(model):
        raise UserError(
            f"`model` must be a plain model without adapter, got {type(model).__name__}; merge or "
            "unload the adapter first, because every attack starts a new one."
        )
    if kind == "full":
        return model.requires_grad_(True)
    if kind != "lora":
        raise UserError(f"`kind` must be 'full' or 'lora', got {kind!r}; choose one of them.")
    _check_adapter(model, rank, targets)
    # Here, because importing peft takes a second and most runs need none of it.
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=0.0,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(unwrap(model), config)


def trainable_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that training may change, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _check_adapter(model: nn.Module, rank: int, targets: Sequence[str]) -> None:
    if rank < 1:
        raise UserError(f"`rank` of the adapter must be at least 1, got {rank}; try 8.")
    kinds = (nn.Linear, Conv1D)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    # A target that is skipped in silence would make a weaker attack look like a strong defence.
    unknown = [
        target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)
    ]
    if unknown or not targets:
        raise UserError(
            f"`targets` must name linear layers of the model, got {unknown or list(targets)}; "
            f"choose among {sorted({name.rpartition('.')[2] for name in names})}."
        )
