"""Which ways of generating a guard can follow."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from dsg.errors import UserError
from dsg.guard.following import Calls

Methods = dict[str, Callable[..., Any]]

_FOLLOWED = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# Older Gemma 2 configurations ask for a hybrid cache, which is a dynamic one by now.
_DYNAMIC = (None, "dynamic", "hybrid")
_CONTINUOUS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
_DEFAULTS = vars(GenerationConfig())


def guarded_methods(model: PreTrainedModel, calls: Calls, reopen: Callable[[], None]) -> Methods:
    """Methods to lie in front of the model's own, which refuse what a guard cannot follow.

    A `generate` that was taken while the guard was attached runs guarded also after that: `reopen`
    puts the hooks in place once more.

    Returns:
        Functions by name. Before any token they raise `UserError` for beam search and other modes
        that move the rows of the KV cache, for an assistant model, for caches that are not dynamic,
        for decoding without a cache, whose steps look like new inputs, for continuous batching, and
        for a `generate` from before.
    """
    unchecked: Callable[..., Any] = model.generate  # type: ignore[assignment]
    prepare: Callable[..., Any] = model._prepare_generation_config  # type: ignore[assignment]
    signature = inspect.signature(unchecked)

    @functools.wraps(unchecked)
    def generate(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        arguments |= arguments.pop("kwargs", {})
        generating = _Generating()
        try:
            calls.begin(generating, reopen)
            _check(prepare, arguments)
            return unchecked(*args, **kwargs)
        except UserError:
            if arguments.get("streamer") is not None:
                # Another thread may be waiting for the next token.
                arguments["streamer"].end()
            raise
        finally:
            calls.end(generating)

    @functools.wraps(prepare)
    def prepare_checked(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(what, _Generating) for what in calls.mine.running):
            raise UserError(
                "a guarded model must generate by its own `generate`, got one that was taken "
                "before the guard was attached; call `model.generate` inside the `with` block."
            )
        return prepare(*args, **kwargs)

    def refuse(*_: Any, **__: Any) -> Any:
        raise UserError(
            "a guarded model must generate by `generate`, got continuous batching, which packs "
            "several sequences into one row; call `generate` with a padded batch."
        )

    methods = {"generate": generate, "_prepare_generation_config": prepare_checked}
    return methods | dict.fromkeys(_CONTINUOUS, refuse)


class _Generating:
    """One call of `generate`."""


def _check(prepare: Callable[..., Any], arguments: dict[str, Any]) -> None:
    settings = {name: value for name, value in arguments.items() if name in _DEFAULTS}
    config, _ = prepare(arguments.get("generation_config"), **settings)
    mode = config.get_generation_mode(arguments.get("assistant_model"))
    if mode not in _FOLLOWED:
        raise UserError(
            "a guarded model must generate by greedy decoding or sampling, got "
            f"{mode.value.replace('_', ' ')}, which moves the rows of the KV cache; pass "
            "num_beams=1 and no assistant model."
        )
    if arguments.get("custom_generate") is not None:
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
