"""Finding a hook point in a Hugging Face model and reading activations there."""

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsg.errors import UserError
from dsg.lm.compiled import never_compiled, recompile, uncompiled
from dsg.lm.tokens import TokenBatch

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
# Other places that SAEs are trained on, none of them the output of a whole layer.
_ELSEWHERE = {
    r"hook_resid_mid": "lies inside the layer, before its MLP",
    r"hook_attn_out|attn\.hook_\w+": "lies in its attention",
    r"hook_mlp_out|mlp\.hook_\w+": "lies in its MLP",
    r"ln[12](_post)?\.hook_\w+": "lies in a normalization",
}

# Attached guards let a pass untouched while this is set, so that a guard's own measurements see
# the unedited model wherever another guard is attached.
_reading: ContextVar[bool] = ContextVar("dsg_reading", default=False)


@runtime_checkable
class Adapted(Protocol):
    """A PEFT model, by what it offers: importing peft takes a second."""

    peft_config: Mapping[str, Any]

    def get_base_model(self) -> nn.Module:
        """The model inside the adapters."""
        ...

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Turns the adapters off inside a `with` block."""
        ...


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
        if isinstance(inner, Adapted):
            inner = inner.get_base_model()
            continue
        parts = dict(inner.named_children()) if isinstance(inner, nn.Module) else {}
        wrapped = [parts[name] for name in ("_orig_mod", "module") if name in parts]
        if not wrapped:
            raise UserError(
                "`model` must be a Hugging Face PreTrainedModel or a PEFT, DDP or compile wrapper "
                f"of one, got {type(inner).__name__}; pass the language model itself."
            )
        inner = wrapped[0]
    return inner


def decoder_of(model: nn.Module) -> nn.Module:
    """The stack of decoder layers, which every forward pass of `model` calls."""
    # Compiled in place or around it, it is this module that runs.
    return uncompiled(unwrap(model).get_decoder())


def hidden_size(model: nn.Module) -> int:
    """Width of the residual stream."""
    return unwrap(model).config.get_text_config().hidden_size


def num_embeddings(model: nn.Module) -> int:
    """Rows of a model's input embedding: the size of its vocabulary, with its padding."""
    return unwrap(model).get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]


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
        hook_point: `blocks.3.hook_resid_post` (output of decoder layer 3), which is also
            `blocks.4.hook_resid_pre`, or a module path of the unwrapped model such as
            `model.layers.3`.

    Raises:
        UserError: If there is no such module, with near names, or it is no place for a guard.
    """
    inner = unwrap(model)
    paths = dict(inner.named_modules())
    if hook_point in paths and hook_point:
        return paths[hook_point]
    layers = inner.config.get_text_config().num_hidden_layers
    block = _BLOCK.fullmatch(hook_point)
    if block and block[2] in ("hook_resid_post", "hook_resid_pre"):
        return _decoder_layer(inner, hook_point, int(block[1]), before=block[2].endswith("pre"))
    if block:
        for pattern, place in _ELSEWHERE.items():
            if re.fullmatch(pattern, block[2]):
                raise _not_a_layer(hook_point, place, int(block[1]))
    if hook_point in ("hook_embed", "hook_pos_embed"):
        raise _not_a_layer(hook_point, "is the embedding", 0)
    if hook_point.startswith("ln_final."):
        raise _not_a_layer(hook_point, "is the final norm", layers - 1)
    outputs = [f"blocks.{layer}.hook_resid_post" for layer in range(layers)]
    near = difflib.get_close_matches(hook_point, [*outputs, *filter(None, paths)], n=4, cutoff=0.4)
    raise UserError(
        f"`hook_point` must name a module of {type(inner).__name__}, got {hook_point!r}; "
        f"near names are {', '.join(near or outputs[:4])}."
    )


def _decoder_layer(
    model: PreTrainedModel, hook_point: str, block: int, *, before: bool
) -> nn.Module:
    layers = _decoder_layers(model)
    if block >= len(layers):
        raise UserError(
            f"`hook_point` must name one of the model's {len(layers)} decoder layers, got "
            f"{hook_point!r}; use 'blocks.0.hook_resid_post' to "
            f"'blocks.{len(layers) - 1}.hook_resid_post'."
        )
    if before and block == 0:
        raise _not_a_layer(hook_point, "is the embedding", 0)
    return layers[block - before]


def _not_a_layer(hook_point: str, place: str, block: int) -> UserError:
    return UserError(
        f"`hook_point` must be the output of a whole decoder layer, got {hook_point!r}, which "
        f"{place}; use 'blocks.{block}.hook_resid_post' and an SAE trained there."
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
        UserError: If the hook point does not exist or never runs.
    """
    inner = unwrap(model)

    @never_compiled
    def stop(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        # Another thread may run the same layer for itself.
        if is_reading():
            raise _Reached(hidden_states(output))

    # In front of every other hook: whatever edits this output must not be seen.
    layer = resolve_hook_point(inner, hook_point)
    handle = layer.register_forward_hook(stop, prepend=True)
    restore = recompile([decoder_of(inner), layer])
    token = _reading.set(True)
    try:
        with torch.no_grad(), evaluating(inner):
            inner(**_inputs(inner, batch.to(inner.device)), use_cache=False)
    except _Reached as reached:
        return reached.activations
    finally:
        _reading.reset(token)
        handle.remove()
        restore()
    raise UserError(
        f"`hook_point` {hook_point!r} must run in the forward pass, but the model never calls it; "
        "choose a decoder layer."
    )


def _inputs(model: PreTrainedModel, batch: TokenBatch) -> dict[str, Tensor]:
    """The batch as arguments, with the positions that `generate` would give padded rows."""
    inputs, mask = batch.model_inputs(), batch.attention_mask
    # Learned positions count from the first column, padding or not, unless told otherwise.
    padded_left = bool((mask[:, 0] == 0).any())
    if padded_left and "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return inputs


class _Reached(Exception):
    """Carries the activations out of a forward pass that need not go on."""

    def __init__(self, activations: Tensor) -> None:
        super().__init__()
        self.activations = activations


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode inside a `with` block; each module's mode is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
