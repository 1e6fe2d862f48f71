"""Guards at work on a model: their hooks are put in place, watched, and taken away."""

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from dsg.errors import UserError, check_choice
from dsg.guard.following import Calls, Follower
from dsg.guard.generation import guarded_methods
from dsg.guard.group import GuardGroup, GuardLike, Policy
from dsg.lm import (
    check_width,
    decoder_of,
    num_embeddings,
    recompile,
    resolve_hook_point,
    unwrap,
)

DecisionRule = Literal["sequence", "prompt"]
Continuation = Literal["running", "frozen"]

_guarded_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_attaching = threading.RLock()


class Attachment:
    """Guards a model from now on until the end of the `with` block that it opens.

    Without a `with` block the model stays guarded until `detach`. A call that is still running in
    another thread at the end, such as a streamer's, is guarded until it returns.

    While attached, the model's forward pass takes two more keyword arguments, which it never sees:
    `token_mask` (True for counted tokens) replaces the guards' own rule for the tokens of this
    call, and `prompt_mask` (True for prompt tokens) says where the prompt ends.

    Tokens that come with a filled KV cache continue what the cache holds; tokens without one begin
    a new input. `generate` is followed where it keeps the rows of its dynamic cache in place:
    greedy decoding and sampling. Everything else is refused before a token is produced.

    Guards of one hook point read the same unedited stream; those of later layers read what earlier
    ones have edited. With gradient checkpointing, call `backward` inside the block and before the
    next forward pass. Several threads may call the model, also one that is compiled; the last
    forward pass is that of the thread that asks, if it ran one.

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

    Raises:
        UserError: Before any token, if a guard does not fit the model, the hook point does not
            exist, or the model is already guarded; in a forward pass, if it cannot be guarded; at
            the end, if somebody else has removed a hook; of a forward pass, if there was none yet.
    """

    def __init__(
        self,
        guards: Sequence[GuardLike],
        model: nn.Module,
        decision: DecisionRule = "sequence",
        continuation: Continuation = "running",
        policy: Policy = "own",
    ) -> None:
        check_choice("decision", decision, get_args(DecisionRule))
        check_choice("continuation", continuation, get_args(Continuation))
        if not guards:
            raise UserError("`guards` must be at least one, got none; append a guard first.")
        for guard in guards:
            check_width(model, guard.features.d_in)
            if guard.model is not None:
                guard.model.check(model)
        self._model, self._inner, decoder = model, unwrap(model), decoder_of(model)
        layers = [self._layer(decoder, guard.hook_point) for guard in guards]
        self._group = GuardGroup(guards, layers, policy, running=continuation == "running")
        models = (model, self._inner)
        self._wiring = Wiring(models, decoder, self._group.layers)
        self._calls = Calls(self._wiring.remove)
        by_prompt = decision == "prompt"
        self._follower = Follower(
            self._group, self._calls, models, decoder, by_prompt=by_prompt, check=self._check
        )
        self._vocabulary = num_embeddings(model)
        self._entered = False
        with _attaching:
            self._wire()
            _guarded_models.add(self._inner)
            self._methods = guarded_methods(self._inner, self._calls, self._wire)
            # They lie in front of the class's methods until `detach` takes them away.
            vars(self._inner).update(self._methods)

    @property
    def triggered(self) -> Bool[Tensor, " batch"]:
        """Whether any guard was open to edit each sequence of the last forward pass."""
        first, *rest = self._follower.last.acted.values()
        return torch.stack([first, *(acted.to(first.device) for acted in rest)]).any(0)

    @property
    def density(self) -> Float[Tensor, " batch"]:
        """Density of each sequence of the last forward pass, by the first guard, float64."""
        return self._follower.last.evidence[0].density

    @property
    def statistic(self) -> Float[Tensor, " batch"]:
        """The first guard's statistic of each sequence of the last forward pass, float64."""
        return self._follower.last.evidence[0].statistic

    @property
    def decisions(self) -> list[Bool[Tensor, " batch"]]:
        """Each guard's own decision about each sequence of the last forward pass."""
        evidence = self._follower.last.evidence
        return [evidence[index].triggered for index in range(len(self._group.guards))]

    def repeat_sequences(self, cache: Any, repeats: int) -> None:
        """Repeats each sequence of a KV cache, to continue one prompt in several ways.

        See `CacheEvidence.repeat`.
        """
        self._follower.memory.repeat(cache, repeats)

    def __enter__(self) -> Self:
        if self._entered or not self._calls.is_open:
            raise UserError(
                "an attachment must be entered once and before it is detached, got one that was "
                "used; call `attached` again."
            )
        self._entered = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        intact = self._wiring.intact()
        self.detach()
        if not intact and kind is None:
            raise _hook_removed()

    def detach(self) -> None:
        """Takes the guard off the model; calls that are still running keep it until they return."""
        with _attaching:
            if not self._calls.is_open:
                return
            for name, method in self._methods.items():
                if vars(self._inner).get(name) is method:
                    del vars(self._inner)[name]
            _guarded_models.discard(self._inner)
            self._calls.close()

    def _wire(self) -> None:
        if self._inner in _guarded_models:
            raise UserError(
                "`model` must carry no guard yet, but one is attached; leave its `with` block "
                "first, or combine the guards in a GuardStack."
            )
        self._wiring.put(self._follower)

    def _check(self) -> None:
        self._wiring.check()
        if num_embeddings(self._inner) != self._vocabulary:
            raise UserError(
                f"the model's vocabulary must stay at {self._vocabulary} tokens while a guard is "
                f"attached, got {num_embeddings(self._inner)}; build a guard for the new model."
            )

    def _layer(self, decoder: nn.Module, hook_point: str) -> nn.Module:
        layer = resolve_hook_point(self._model, hook_point)
        if layer is decoder or layer not in set(decoder.modules()):
            raise UserError(
                f"`hook_point` must lie inside the decoder {type(decoder).__name__}, got "
                f"{hook_point!r}; use one of its layers."
            )
        return layer


class Wiring:
    """Hooks on a model and on the modules inside it that a guard must see.

    Args:
        models: The model as it was given, and the Hugging Face model inside it.
        decoder: Its stack of decoder layers.
        layers: The guarded layers.
    """

    def __init__(
        self, models: Sequence[nn.Module], decoder: nn.Module, layers: Sequence[nn.Module]
    ) -> None:
        self._models = list(dict.fromkeys(models))
        self._decoder, self._layers = decoder, list(layers)
        self._handles: list[RemovableHandle] = []
        self._undo: list[Callable[[], None]] = []

    def put(self, hooks: Follower) -> None:
        """Puts the hooks in place."""
        for module in self._models:
            self._handles += [
                module.register_forward_pre_hook(hooks.before_model, with_kwargs=True),
                module.register_forward_hook(hooks.after_model, always_call=True),
            ]
        decoder, after = self._decoder, hooks.after_layer
        self._handles += [
            decoder.register_forward_pre_hook(hooks.before_decoder, with_kwargs=True),
            decoder.register_forward_hook(hooks.after_decoder, with_kwargs=True, always_call=True),
            # First of all hooks, so that `output_hidden_states` always records the edited stream.
            *(layer.register_forward_hook(after, prepend=True) for layer in self._layers),
        ]
        watch = register_module_module_registration_hook(self._refuse_another_decoder)
        self._undo = [watch.remove, recompile((self._decoder, *self._layers))]

    def remove(self) -> None:
        """Takes away whatever is still in place."""
        for undo in (*(handle.remove for handle in self._handles), *self._undo):
            undo()
        self._handles, self._undo = [], []

    def check(self) -> None:
        """Refuses a model on which the hooks can see nothing.

        Raises:
            UserError: If a hook was removed, or the decoder replaced.
        """
        if not self.intact():
            raise _hook_removed()
        decoder = self._models[-1].get_decoder()  # type: ignore[operator]
        if decoder is not self._decoder and not _contains(decoder, self._decoder):
            raise _decoder_replaced(decoder)

    def intact(self) -> bool:
        """Whether every hook is still where it was put."""
        hooks = [(handle.id, handle.hooks_dict_ref()) for handle in self._handles]
        return all(registered is not None and id in registered for id, registered in hooks)

    def _refuse_another_decoder(
        self, parent: nn.Module, name: str, child: nn.Module | None
    ) -> None:
        present = parent._modules.get(name)
        if (
            _contains(present, self._decoder)
            and not _contains(child, self._decoder)
            and _contains(self._models[-1], parent)
        ):
            raise _decoder_replaced(child)


def _hook_removed() -> UserError:
    return UserError(
        "a guard's hooks must stay in place while it is attached, but one was removed, so the "
        "model may have run unguarded; leave the `with` block instead of removing hooks."
    )


def _contains(module: nn.Module | None, part: nn.Module) -> bool:
    return module is not None and any(part is inner for inner in module.modules())


def _decoder_replaced(other: nn.Module | None) -> UserError:
    return UserError(
        "the model's decoder must stay the one that the guard was attached to, got another "
        f"{type(other).__name__}; leave the `with` block, replace it, and attach the guard again."
    )
