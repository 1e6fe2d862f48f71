"""Finding a hook point in a Hugging Face model and reading activations there."""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsg.errors import UserError
from dsg.tokens import TokenBatch

_BLOCK = re.compile(r"blocks\.(\d+)\.hook_resid_post")

# Attached guards let a pass untouched while this is set, so that a guard's own measurements see
# the unedited model wherever another guard is attached.
_reading: ContextVar[bool] = ContextVar("dsg_reading", default=False)


def is_reading() -> bool:
    """True while `read_activations` runs."""
    return _reading.get()


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside PEFT, DistributedDataParallel or `torch.compile` wrappers.

    Raises:
        UserError: If there is no `PreTrainedModel` inside.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            raise UserError(
                "`model` must be a Hugging Face PreTrainedModel or a PEFT, DDP or compile wrapper "
                f"of one, got {type(inner).__name__}; pass the language model itself."
            )
    return inner


def decoder_of(model: nn.Module) -> nn.Module:
    """The stack of decoder layers, which every forward pass of `model` calls."""
    return unwrap(model).get_decoder()


def hidden_size(model: nn.Module) -> int:
    """Width of the residual stream."""
    return unwrap(model).config.get_text_config().hidden_size


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    num_layers = unwrap(model).config.get_text_config().num_hidden_layers
    for child in decoder_of(model).children():
        if isinstance(child, nn.ModuleList) and len(child) == num_layers:
            return child
    raise UserError(
        f"`model` {type(unwrap(model)).__name__} has no list of {num_layers} decoder layers to "
        "count in; give `hook_point` as a module path such as 'model.layers.3'."
    )


def resolve_hook_point(model: nn.Module, hook_point: str) -> nn.Module:
    """The module whose output is the hook point.

    Args:
        model: A Hugging Face model, possibly wrapped.
        hook_point: `blocks.3.hook_resid_post` (output of decoder layer 3), or a module path of
            the unwrapped model such as `model.layers.3`.

    Raises:
        UserError: If there is no such module; the message lists near names.
    """
    inner = unwrap(model)
    paths = dict(inner.named_modules())
    if hook_point in paths and hook_point:
        return paths[hook_point]
    block = _BLOCK.fullmatch(hook_point)
    if block:
        layers = _decoder_layers(inner)
        if int(block[1]) < len(layers):
            return layers[int(block[1])]
        raise UserError(
            f"`hook_point` must name one of the model's {len(layers)} decoder layers, got "
            f"{hook_point!r}; use 'blocks.0.hook_resid_post' to "
            f"'blocks.{len(layers) - 1}.hook_resid_post'."
        )
    num_layers = inner.config.get_text_config().num_hidden_layers
    known = [f"blocks.{layer}.hook_resid_post" for layer in range(num_layers)]
    near = difflib.get_close_matches(hook_point, [*known, *filter(None, paths)], n=4, cutoff=0.4)
    raise UserError(
        f"`hook_point` must name a module of {type(inner).__name__}, got {hook_point!r}; "
        f"near names are {', '.join(near or known[:4])}."
    )


def check_width(model: nn.Module, d_in: int) -> None:
    """Refuses an SAE whose input width is not that of the residual stream.

    Raises:
        UserError: If the widths differ.
    """
    width = hidden_size(model)
    if d_in != width:
        raise UserError(
            f"the SAE's d_in must equal the model's residual width {width}, got {d_in}; use an "
            f"SAE trained on {unwrap(model).config.name_or_path or type(unwrap(model)).__name__}."
        )


def hidden_states(output: Any) -> Tensor:
    """The hidden states in a layer's output, which is a tensor or a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


def read_activations(
    model: nn.Module, hook_point: str, batch: TokenBatch
) -> Float[Tensor, "batch seq d_in"]:
    """Activations of the unedited model at a hook point; later layers do not run.

    The model runs in evaluation mode and without gradients; its mode is restored.

    Args:
        model: A Hugging Face model, possibly wrapped.
        hook_point: Where to read.
        batch: Input on any device.

    Returns:
        The hook point's output in the model's dtype and on its device.

    Raises:
        UserError: If the hook point does not exist.
    """
    inner = unwrap(model)

    def stop(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        raise _Reached(hidden_states(output))

    # In front of every other hook: whatever edits this output must not be seen.
    handle = resolve_hook_point(inner, hook_point).register_forward_hook(stop, prepend=True)
    token = _reading.set(True)
    try:
        with torch.no_grad(), _evaluating(inner):
            inner(**batch.to(inner.device).model_inputs(), use_cache=False)
    except _Reached as reached:
        return reached.activations
    finally:
        _reading.reset(token)
        handle.remove()
    raise UserError(
        f"`hook_point` {hook_point!r} must run in the forward pass, but the model never calls it; "
        "choose a decoder layer."
    )


class _Reached(Exception):
    """Carries the activations out of a forward pass that need not go on."""

    def __init__(self, activations: Tensor) -> None:
        super().__init__()
        self.activations = activations


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
