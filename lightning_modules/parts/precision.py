"""Runs in another precision than float32: `bf16-true`, `16-true` and `64-true`."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from dsg.errors import UserError

_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


def use_precision(trainer: lightning.Trainer) -> None:
    """Cast a run's weights and nothing else; for the beginning of `configure_model`.

    Lightning would also cast buffers, such as the frequencies of rotary positions, which lose whole
    tokens in half precision; let tensors made during a step have that precision, such as sums over
    tokens; and try to convert batches, which hold ids and masks and cannot be written to.

    Raises:
        UserError: The run trains in `16-true`.
    """
    plugin = trainer.precision_plugin
    if not isinstance(plugin, HalfPrecision | DoublePrecision):
        return
    if plugin.precision == "16-true" and trainer.state.fn == TrainerFn.FITTING:
        raise UserError(
            "`precision` must not be '16-true' in a run that trains, because the squares of "
            "gradients vanish in float16 and AdamW divides by them, got '16-true'; use 'bf16-true' "
            "or '16-mixed'."
        )
    plugin.convert_input = _unchanged  # type: ignore[method-assign]
    plugin.forward_context = nullcontext  # type: ignore[method-assign,assignment]
    plugin.convert_module = partial(  # type: ignore[method-assign]
        _cast_weights, dtype=_DTYPES[plugin.precision]
    )
    # Inside Lightning's own context, which puts back what was before.
    torch.set_default_dtype(torch.float32)


def _unchanged(batch: Any) -> Any:
    return batch


def _cast_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    for weight in module.parameters():
        weight.data = weight.data.to(dtype)
    return module
