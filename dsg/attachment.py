"""The hooks that put guards to work on a model."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dsg.errors import UserError, check_choice
from dsg.generation import checked_generate
from dsg.hooks import (
    check_width,
    decoder_of,
    hidden_states,
    is_reading,
    resolve_hook_point,
    unwrap,
)
from dsg.identity import num_embeddings
from dsg.inputs import ForwardInputs, argument, pop_masks
from dsg.panel import ForwardPass, Panel, Policy
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
    policy: Policy = "own",
) -> Iterator["Attachment"]:
    """Guards a model inside a `with` block, and always detaches at its end.

    While attached, the model's forward pass takes two more keyword arguments, which it never sees:
    `token_mask` (True for counted tokens) replaces the guards' own rule for the tokens of this
    call, and `prompt_mask` (True for prompt tokens) says where the prompt ends.

    Tokens that come with a filled KV cache continue what the cache holds; tokens without one begin
    a new input. `generate` is followed where it keeps the rows of its dynamic cache in place:
    greedy decoding and sampling. Everything else is refused before a token is produced.

    Guards of one hook point read the same unedited stream; those of later layers read what earlier
    ones have edited. With gradient checkpointing, call `backward` before the next forward pass.

    Args:
        guards: Guards of one or several hook points, oldest first.
        model: The language model, possibly wrapped by PEFT or DDP.
        decision: `sequence`: a whole new input decides for all its positions. `prompt`: only its
            prompt does (all of it without `prompt_mask`), and the rest is continuation.
        continuation: `running`: each position after the prompt extends the counts, and once the
            statistic exceeds the threshold the sequence stays triggered. `frozen`: the prompt's
            decision holds for all that follows.
        policy: Who edits a sequence. `own`: each guard whose gate is open. `any`: all guards, once
            one gate is open; `majority`: all guards, once more than half of the gates are open.
            Gates of layers that are yet to run have no vote.

    Yields:
        The attachment, which tells the decisions of the last forward pass.

    Raises:
        UserError: Before any token, if a guard does not fit the model, the hook point does not
            exist, or the model is already guarded; in a forward pass, if it cannot be guarded; at
            the end, if somebody else has removed a hook.
    """
    attachment = Attachment(guards, model, decision, continuation, policy)
    attachment._attach()
    try:
        yield attachment
    finally:
        intact = attachment._intact()
        attachment._detach()
    if not intact:
        raise _hook_removed()


class Attachment:
    """Guards at work on one model; made by `attach`, whose arguments it takes.

    What it says about the last forward pass raises `UserError` if there was none yet.
    """

    def __init__(
        self,
        guards: Sequence["Guard"],
        model: nn.Module,
        decision: DecisionRule,
        continuation: Continuation,
        policy: Policy,
    ) -> None:
        check_choice("decision", decision, get_args(DecisionRule))
        check_choice("continuation", continuation, get_args(Continuation))
        check_choice("policy", policy, get_args(Policy))
        if not guards:
            raise UserError("`guards` must be at least one, got none; append a guard first.")
        for guard in guards:
            check_width(model, guard.features.d_in)
            if guard.model is not None:
                guard.model.check(model)
        self._guards = list(guards)
        # Read once: buffers on an accelerator would make every forward pass wait for it.
        self._uncounted_ids = [guard.uncounted_ids for guard in guards]
        self._model, self._inner, self._decoder = model, unwrap(model), decoder_of(model)
        layers = [self._layer(guard.hook_point) for guard in guards]
        self._panel = Panel(guards, layers, policy, running=continuation == "running")
        self._vocabulary = num_embeddings(model)
        self._by_prompt = decision == "prompt"
        self._handles: list[RemovableHandle] = []
        self._given: dict[str, Tensor] = {}
        self._forward: ForwardPass | None = None
        self._last: ForwardPass | None = None
        self._memory = CacheMemory()

    @property
    def triggered(self) -> Bool[Tensor, " batch"]:
        """Whether any guard was open to edit each sequence of the last forward pass."""
        first, *rest = self._finished().acted.values()
        return torch.stack([first, *(acted.to(first.device) for acted in rest)]).any(0)

    @property
    def density(self) -> Float[Tensor, " batch"]:
        """Density of each sequence of the last forward pass, by the first guard, float64."""
        return self._finished().evidence[0].density

    @property
    def statistic(self) -> Float[Tensor, " batch"]:
        """The first guard's statistic of each sequence of the last forward pass, float64."""
        return self._finished().evidence[0].statistic

    @property
    def decisions(self) -> list[Bool[Tensor, " batch"]]:
        """Each guard's own decision about each sequence of the last forward pass."""
        evidence = self._finished().evidence
        return [evidence[index].triggered for index in range(len(self._guards))]

    def repeat_sequences(self, cache: Any, repeats: int) -> None:
        """Repeats each sequence of a KV cache, to continue one prompt in several ways.

        See `CacheMemory.repeat`.
        """
        self._memory.repeat(cache, repeats)

    def _finished(self) -> ForwardPass:
        if self._last is None:
            raise UserError("decisions must be asked for after a forward pass; run one first.")
        return self._last

    def _layer(self, hook_point: str) -> nn.Module:
        layer = resolve_hook_point(self._model, hook_point)
        if layer is self._decoder or layer not in set(self._decoder.modules()):
            raise UserError(
                f"`hook_point` must lie inside the decoder {type(self._decoder).__name__}, got "
                f"{hook_point!r}; use one of its layers."
            )
        return layer

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
            # First of all hooks, so that `output_hidden_states` always records the edited stream.
            *(
                layer.register_forward_hook(self._after_layer, prepend=True)
                for layer in self._panel.layers
            ),
        ]
        # Lies in front of the class's method until `_detach` takes it away.
        self._inner.__dict__["generate"] = checked_generate(self._inner)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inner.__dict__.pop("generate", None)
        _guarded_models.discard(self._inner)

    def _intact(self) -> bool:
        """Whether every hook is still where it was put."""
        hooks = [(handle.id, handle.hooks_dict_ref()) for handle in self._handles]
        return all(registered is not None and id in registered for id, registered in hooks)

    def _before_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for name in ("input_ids", "attention_mask"):
            tensor = argument(module, name, args, kwargs)
            self._given |= {name: tensor} if tensor is not None else {}
        self._given |= pop_masks(kwargs)
        return args, kwargs

    def _after_model(self, *_: Any) -> None:
        # Also after an exception: masks must not reach the next call.
        self._given.clear()

    def _before_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # A wrapper that calls `forward` directly skips `_before_model`: the masks come this far.
        given = self._given | pop_masks(kwargs)
        if not is_reading():
            self._check_unchanged()
            self._forward = self._plan(ForwardInputs.of(module, args, kwargs, given))
        return args, kwargs

    def _plan(self, inputs: ForwardInputs) -> ForwardPass:
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
        return ForwardPass(counted, prompt, earlier, past_length(inputs.cache) + inputs.shape[1])

    def _check_unchanged(self) -> None:
        if not self._intact():
            raise _hook_removed()
        if num_embeddings(self._inner) != self._vocabulary:
            raise UserError(
                f"the model's vocabulary must stay at {self._vocabulary} tokens while a guard is "
                f"attached, got {num_embeddings(self._inner)}; build a guard for the new model."
            )

    def _after_layer(self, layer: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if is_reading():
            return None
        forward, h = self._forward, hidden_states(output)
        if forward is None or forward.prompt.shape != h.shape[:2] or _stray(forward):
            raise UserError(
                "a guarded layer must run inside its model's forward pass, but it ran alone; call "
                "the model that the guard is attached to."
            )
        edited = self._panel.edit(forward, layer, h)
        if edited is h:
            return None
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def _after_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        forward = self._forward
        if is_reading() or forward is None:
            return
        missing = [i for i in range(len(self._guards)) if i not in forward.evidence]
        if missing:
            raise UserError(
                f"`hook_point` {self._guards[missing[0]].hook_point!r} must run in each forward "
                "pass, but the model skipped it; choose a layer that always runs."
            )
        forward.finished = True
        if not torch.is_grad_enabled():
            forward.seen.clear()
        self._last = forward
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            cache = argument(module, "past_key_values", args, kwargs)
        evidence = [forward.evidence[index] for index in range(len(self._guards))]
        self._memory.remember(cache, evidence, forward.num_positions)


def _stray(forward: ForwardPass) -> bool:
    """Whether a layer runs after its forward pass, and not to be recomputed for a gradient."""
    return forward.finished and torch._C._current_graph_task_id() == -1


def _hook_removed() -> UserError:
    return UserError(
        "a guard's hooks must stay in place while it is attached, but one was removed, so the "
        "model may have run unguarded; leave the `with` block instead of removing hooks."
    )
