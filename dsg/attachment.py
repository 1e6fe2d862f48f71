"""The hooks that put guards to work on a model."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dsg.edit import Clamp, apply_clamps, clamp_entries
from dsg.errors import UserError, check_choice
from dsg.gate import Evidence, decide, fired_tokens
from dsg.hooks import (
    check_width,
    decoder_of,
    hidden_states,
    is_reading,
    resolve_hook_point,
    unwrap,
)
from dsg.inputs import MASKS, ForwardInputs, argument
from dsg.running import CacheMemory, past_length

if TYPE_CHECKING:
    from dsg.guard import Guard

DecisionRule = Literal["sequence", "prompt"]
Continuation = Literal["running", "frozen"]

_guarded_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def attach(
    guards: Sequence["Guard"],
    model: nn.Module,
    decision: DecisionRule = "sequence",
    continuation: Continuation = "running",
) -> Iterator["Attachment"]:
    """Guards a model inside a `with` block, and always detaches at its end.

    While attached, the model's forward pass takes two more keyword arguments, which it never sees:
    `token_mask` (True for counted tokens) replaces the guards' own rule for the tokens of this
    call, and `prompt_mask` (True for prompt tokens) says where the prompt ends.

    Tokens that come with a filled KV cache continue what the cache holds; tokens without one begin
    a new input, so `generate` needs its cache (`use_cache=True`, the default). A cache that this
    attachment has not filled itself, or whose rows were moved or trimmed, is refused.

    Args:
        guards: Guards of one hook point, oldest first.
        model: The language model, possibly wrapped by PEFT or DDP.
        decision: `sequence`: a whole new input decides for all its positions. `prompt`: only its
            prompt does (all of it without `prompt_mask`), and the rest is continuation.
        continuation: `running`: each position after the prompt extends the counts, and once the
            density exceeds the threshold the sequence stays triggered. `frozen`: the prompt's
            decision holds for all that follows.

    Yields:
        The attachment, which tells the decisions of the last forward pass.

    Raises:
        UserError: Before any token, if a guard does not fit the model, the hook point does not
            exist, or the model is already guarded; in a forward pass, if it cannot be guarded.
    """
    attachment = Attachment(guards, model, decision, continuation)
    attachment._attach()
    try:
        yield attachment
    finally:
        attachment._detach()


@dataclass
class _Forward:
    """One forward pass between its first and its last hook."""

    counted: list[Tensor]
    prompt: Tensor
    earlier: list[Evidence] | None
    num_positions: int
    evidence: list[Evidence] | None = None


class Attachment:
    """Guards at work on one model; made by `attach`.

    Args:
        guards: Guards of one hook point, oldest first.
        model: The language model, possibly wrapped.
        decision: Whose tokens decide for a new input.
        continuation: What happens after the prompt.
    """

    def __init__(
        self,
        guards: Sequence["Guard"],
        model: nn.Module,
        decision: DecisionRule,
        continuation: Continuation,
    ) -> None:
        check_choice("decision", decision, get_args(DecisionRule))
        check_choice("continuation", continuation, get_args(Continuation))
        if not guards:
            raise UserError("`guards` must be at least one, got none; append a guard first.")
        for guard in guards:
            check_width(model, guard.features.d_in)
        self._guards = list(guards)
        # Read once: buffers on an accelerator would make every forward pass wait for it.
        self._uncounted_ids = [guard.uncounted_ids for guard in guards]
        # No density is below 0: a token gate is a density gate that is always open.
        self._thresholds = [-1.0 if g.gate == "token" else g.threshold for g in guards]
        self._values = [guard.activation_value for guard in guards]
        self._features = [guard.features for guard in guards]
        self._model, self._inner, self._decoder = model, unwrap(model), decoder_of(model)
        self._layer = resolve_hook_point(model, guards[0].hook_point)
        if self._layer is self._decoder or self._layer not in set(self._decoder.modules()):
            raise UserError(
                f"`hook_point` must lie inside the decoder {type(self._decoder).__name__}, got "
                f"{guards[0].hook_point!r}; use one of its layers."
            )
        self._by_prompt, self._running = decision == "prompt", continuation == "running"
        self._handles: list[RemovableHandle] = []
        self._given: dict[str, Tensor] = {}
        self._forward: _Forward | None = None
        self._last: list[Evidence] | None = None
        self._memory = CacheMemory()

    @property
    def triggered(self) -> Bool[Tensor, " batch"]:
        """Whether each sequence of the last forward pass was triggered by any guard.

        Raises:
            UserError: If there was no forward pass yet.
        """
        return torch.stack([evidence.triggered for evidence in self._evidence()]).any(0)

    @property
    def density(self) -> Float[Tensor, " batch"]:
        """Density of each sequence of the last forward pass, by the first guard, float64.

        Raises:
            UserError: If there was no forward pass yet.
        """
        return self._evidence()[0].density

    def repeat_sequences(self, cache: Any, repeats: int) -> None:
        """Repeats each sequence of a KV cache, to continue one prompt in several ways.

        Args:
            cache: A dynamic KV cache that a forward pass of this attachment has filled.
            repeats: Copies of each sequence; they lie in adjacent rows.

        Raises:
            UserError: If the cache was filled elsewhere.
        """
        self._memory.repeat(cache, repeats)

    def _evidence(self) -> list[Evidence]:
        if self._last is None:
            raise UserError("decisions must be asked for after a forward pass; run one first.")
        return self._last

    def _attach(self) -> None:
        if self._inner in _guarded_models:
            raise UserError(
                "`model` must carry no guard yet, but one is attached; leave its `with` block "
                "first, or combine the guards in a GuardStack."
            )
        _guarded_models.add(self._inner)
        for module in {self._model, self._inner}:
            self._handles += [
                module.register_forward_pre_hook(self._before_model, with_kwargs=True),
                module.register_forward_hook(self._after_model, always_call=True),
            ]
        self._handles += [
            self._decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            self._decoder.register_forward_hook(self._after_decoder, with_kwargs=True),
            self._layer.register_forward_hook(self._after_layer),
        ]

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _guarded_models.discard(self._inner)

    def _before_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        input_ids = argument(module, "input_ids", args, kwargs)
        self._given |= {"input_ids": input_ids} if input_ids is not None else {}
        self._given |= _pop_masks(kwargs)
        return args, kwargs

    def _after_model(self, *_: Any) -> None:
        # Also after an exception: masks must not reach the next call.
        self._given.clear()

    def _before_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # A wrapper that calls `forward` directly skips `_before_model`: the masks come this far.
        given = self._given | _pop_masks(kwargs)
        if not is_reading():
            self._forward = self._plan(ForwardInputs.of(module, args, kwargs, given))
        return args, kwargs

    def _plan(self, inputs: ForwardInputs) -> _Forward:
        counted = [
            inputs.counted(uncounted_ids, guard.pad_id)
            for guard, uncounted_ids in zip(self._guards, self._uncounted_ids, strict=True)
        ]
        earlier = self._memory.recall(inputs.cache, inputs.shape[0])
        if earlier is not None and inputs.prompt_mask is not None:
            raise UserError(
                "`prompt_mask` must come with a new input, got one with a filled KV cache; leave "
                "it out when continuing."
            )
        prompt = torch.ones(inputs.shape, dtype=torch.bool, device=inputs.device)
        if self._by_prompt:
            prompt = inputs.prompt(counted[0])
        return _Forward(counted, prompt, earlier, past_length(inputs.cache) + inputs.shape[1])

    def _after_layer(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if is_reading():
            return None
        forward, h = self._forward, hidden_states(output)
        if forward is None or forward.prompt.shape != h.shape[:2]:
            raise UserError(
                "a guarded layer must run inside its model's forward pass, but it ran alone; call "
                "the model that the guard is attached to."
            )
        clamps, evidence = [], []
        for index, guard in enumerate(self._guards):
            features = self._features[index] = self._features[index].on(h.device)
            feature_acts = features.encode(h)
            counted = forward.counted[index].to(h.device)
            positions, seen = decide(
                fired_tokens(feature_acts, counted),
                counted,
                forward.prompt.to(h.device),
                self._thresholds[index],
                forward.earlier[index] if forward.earlier is not None else None,
                running=self._running,
            )
            entries = clamp_entries(feature_acts, positions & counted, guard.clamp_scope)
            clamps.append(Clamp(features, feature_acts, entries, self._values[index]))
            evidence.append(seen)
        # Assigned, not accumulated: activation checkpointing may run a layer twice.
        forward.evidence = evidence
        edited = apply_clamps(h, clamps)
        if edited is h:
            return None
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def _after_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        forward = self._forward
        if is_reading() or forward is None:
            return
        if forward.evidence is None:
            raise UserError(
                f"`hook_point` {self._guards[0].hook_point!r} must run in each forward pass, but "
                "the model skipped it; choose a layer that always runs."
            )
        self._last = forward.evidence
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            cache = argument(module, "past_key_values", args, kwargs)
        self._memory.remember(cache, forward.evidence, forward.num_positions)


def _pop_masks(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    popped = {name: kwargs.pop(name, None) for name in MASKS}
    return {name: mask for name, mask in popped.items() if mask is not None}
