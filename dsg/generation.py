"""Which ways of generating a guard can follow."""

import copy
import functools
from collections.abc import Callable
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from dsg.errors import UserError

_FOLLOWED = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# Older Gemma 2 configurations ask for a hybrid cache, which is a dynamic one by now.
_DYNAMIC = (None, "dynamic", "hybrid")


def checked_generate(model: PreTrainedModel) -> Callable[..., Any]:
    """The model's `generate`, which refuses what a guard cannot follow before any token.

    Args:
        model: The unwrapped model.

    Returns:
        A function with the arguments of `generate`. It raises `UserError` for beam search and
        other modes that move the rows of the KV cache, for an assistant model, for caches that are
        not dynamic, and for decoding without a cache, whose steps look like new inputs.
    """
    unchecked: Callable[..., Any] = model.generate  # type: ignore[assignment]

    @functools.wraps(unchecked)
    def generate(*args: Any, **kwargs: Any) -> Any:
        _check(model, kwargs)
        return unchecked(*args, **kwargs)

    return generate


def _check(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    given = kwargs.get("generation_config") or model.generation_config or GenerationConfig()
    config = copy.deepcopy(given)
    config.update(**{name: value for name, value in kwargs.items() if hasattr(config, name)})
    mode = config.get_generation_mode(kwargs.get("assistant_model"))
    if mode not in _FOLLOWED:
        raise UserError(
            "a guarded model must generate by greedy decoding or sampling, got "
            f"{mode.value.replace('_', ' ')}, which moves the rows of the KV cache; pass "
            "num_beams=1 and no assistant model."
        )
    if kwargs.get("custom_generate") is not None:
        raise UserError(
            "a guarded model must generate with the model's own loop, got `custom_generate`; leave "
            "it out."
        )
    if config.use_cache is False:
        raise UserError(
            "`use_cache` must be true for a guarded model to generate, got False, with which each "
            "step looks like a new input; leave it out."
        )
    if config.cache_implementation not in _DYNAMIC:
        raise UserError(
            "`cache_implementation` must be 'dynamic' for a guarded model, got "
            f"{config.cache_implementation!r}; leave it out."
        )
    if config.prefill_chunk_size is not None:
        raise UserError(
            "`prefill_chunk_size` must be None for a guarded model, whose prompt decides as a "
            f"whole, got {config.prefill_chunk_size}; leave it out."
        )
