"""Following the calls of a guarded model thread by thread, and their passes hook by hook."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from dsg.errors import UserError
from dsg.guard.group import ForwardPass, GuardGroup
from dsg.guard.inputs import ForwardInputs, named_arguments, pop_masks
from dsg.guard.kv_cache import CacheEvidence, past_length
from dsg.lm import hidden_states, is_reading, never_compiled


class ThreadState(threading.local):
    """What a guard knows about the calls of one thread; each thread sees its own.

    Attributes:
        running: Modules and `generate` calls in progress, outermost first.
        given: Masks and ids that the model was called with.
        forward: The forward pass in progress, or the last one.
        last: The last finished forward pass.
        num_passes: Finished forward passes.
        begun_at: `num_passes` when each module in progress began.
    """

    def __init__(self) -> None:
        self.running: list[object] = []
        self.given: dict[str, Tensor] = {}
        self.forward: ForwardPass | None = None
        self.last: ForwardPass | None = None
        self.num_passes = 0
        self.begun_at: dict[nn.Module, int] = {}


class Calls:
    """Which calls a guard follows: those that begin before `close`, each of them to its end.

    A call that is still running in another thread then, such as a streamer's, loses its guard
    when it returns and no earlier.

    Args:
        when_done: Called once after `close`, as soon as no call is running.

    Attributes:
        mine: What is known about the calls of this thread.
        is_open: Whether calls that begin now are followed.
    """

    def __init__(self, when_done: Callable[[], None]) -> None:
        self.mine = ThreadState()
        self._when_done = when_done
        self.is_open = True
        self._threads: set[int] = set()
        self._lock = threading.RLock()

    @property
    def is_following(self) -> bool:
        """Whether a call of this thread is followed."""
        return bool(self.mine.running)

    def begin(self, what: object, reopen: Callable[[], None] | None = None) -> bool:
        """Notes that something begins in this thread, and returns whether the guard follows it.

        Args:
            what: A module, or any other object for a call of `generate`.
            reopen: Called if the guard has been closed, to follow this call nevertheless.
        """
        running = self.mine.running
        if what in running:
            # A compiled module ends with an exception without a word.
            self.end(what)
        if not running:
            with self._lock:
                if not self.is_open and reopen is None:
                    return False
                if not self.is_open and not self._threads and reopen is not None:
                    reopen()
                self._threads.add(threading.get_ident())
        running.append(what)
        return True

    def end(self, what: object) -> None:
        """Notes that something, and all that began inside it, has ended in this thread."""
        running = self.mine.running
        if what in running:
            del running[running.index(what) :]
        if not running:
            with self._lock:
                self._threads.discard(threading.get_ident())
                self._finish()

    def close(self) -> None:
        """Follows no call that begins from now on."""
        with self._lock:
            self.is_open = False
            if all(isinstance(what, nn.Module) for what in self.mine.running):
                # No forward pass leaves a `with` block around it: an exception left these behind.
                self.mine.running.clear()
                self._threads.discard(threading.get_ident())
            self._finish()

    def _finish(self) -> None:
        if not self.is_open and not self._threads:
            self._when_done()


class Follower:
    """What the hooks of an attached guard do.

    They run as they are written and are never compiled: a graph would take the state of the thread
    that it was traced in for a constant.

    Args:
        group: The guards at their layers.
        calls: The calls to follow.
        models: The model as it was given, and the Hugging Face model inside it.
        decoder: Its stack of decoder layers.
        by_prompt: Whether only the prompt of a new input decides at once.
        check: Called before each pass; raises where the model is no longer what it was.
    """

    def __init__(
        self,
        group: GuardGroup,
        calls: Calls,
        models: Sequence[nn.Module],
        decoder: nn.Module,
        *,
        by_prompt: bool,
        check: Callable[[], None],
    ) -> None:
        self.memory = CacheEvidence()
        self._group, self._calls = group, calls
        self._models, self._decoder = tuple(models), decoder
        self._by_prompt, self._check = by_prompt, check
        self._last: ForwardPass | None = None
        self._trained: ForwardPass | None = None

    @property
    def last(self) -> ForwardPass:
        """The last finished forward pass: of this thread, or else of any.

        Raises:
            UserError: If there was none.
        """
        last = self._calls.mine.last or self._last
        if last is None:
            raise UserError("decisions must be asked for after a forward pass; run one first.")
        return last

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise UserError(
            "a model must not be copied or pickled while a guard is attached, whose hooks and "
            "`generate` would stay those of the original; copy it first, and guard the copy."
        )

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        self.__deepcopy__({})

    @never_compiled
    def before_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the model: checks it, and takes the guard's own arguments."""
        if module not in self._models:
            raise _replica(module)
        if not self._calls.begin(module):
            return args, kwargs
        mine = self._calls.mine
        mine.begun_at[module] = mine.num_passes
        if not is_reading():
            self._check()
        arguments = named_arguments(module, args, kwargs)
        for name in ("input_ids", "attention_mask"):
            tensor = arguments.get(name)
            mine.given |= {name: tensor} if tensor is not None else {}
        mine.given |= pop_masks(kwargs)
        return args, kwargs

    @never_compiled
    def after_model(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """After the model: an output in which the decoder had no part is refused."""
        mine = self._calls.mine
        # Also after an exception, when there is no output: masks must not reach the next call.
        mine.given.clear()
        begun_at = mine.begun_at.pop(module, None)
        self._calls.end(module)
        if output is not None and begun_at == mine.num_passes and not is_reading():
            raise UserError(
                "the decoder that a guard is attached to must run in each forward pass, but it did "
                "not, so this output is unguarded; attach the guard before the model is compiled, "
                "traced or wrapped, or call `torch.compiler.reset()` after attaching it."
            )

    @never_compiled
    def before_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the decoder: plans the pass."""
        if module is not self._decoder:
            raise _replica(module)
        if not self._calls.begin(module):
            return args, kwargs
        mine = self._calls.mine
        # A wrapper that calls `forward` directly skips `before_model`: the masks come this far.
        given = mine.given | pop_masks(kwargs)
        if not is_reading():
            self._check()
            arguments = named_arguments(module, args, kwargs)
            mine.forward = self._plan(ForwardInputs.of(arguments, given))
        return args, kwargs

    def _plan(self, inputs: ForwardInputs) -> ForwardPass:
        counted = [
            inputs.counted(guard.uncounted_ids, guard.pad_id) for guard in self._group.guards
        ]
        earlier = self.memory.recall(inputs.cache, inputs.shape[0])
        if earlier is not None and inputs.prompt_mask is not None:
            raise UserError(
                "`prompt_mask` must come with a new input, got one with a filled KV cache; leave "
                "it out when continuing."
            )
        prompt = inputs.prompt(counted[0]) if self._by_prompt else None
        return ForwardPass(counted, prompt, earlier, past_length(inputs.cache) + inputs.shape[1])

    @never_compiled
    def after_layer(self, layer: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        """After a guarded layer: its guards decide and write."""
        h, forward = hidden_states(output), self._calls.mine.forward
        recomputing = torch._C._current_graph_task_id() != -1
        if is_reading() or not (recomputing or self._calls.is_following or self._calls.is_open):
            return None
        if recomputing and (forward is None or forward.finished):
            # Perhaps in a thread of autograd's own, which has seen no forward pass.
            forward = self._trained
        elif forward is not None and forward.finished:
            forward = None
        if forward is None or forward.counted[0].shape != h.shape[:2]:
            raise UserError(
                "a guarded layer must run inside its model's forward pass, but it ran alone; call "
                "the model that the guard is attached to."
            )
        edited = self._group.edit(forward, layer, h)
        if edited is h:
            return None
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    @never_compiled
    def after_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """After the decoder: takes down what the pass has shown."""
        mine = self._calls.mine
        forward, following = mine.forward, self._calls.is_following
        self._calls.end(module)
        if is_reading() or forward is None or not following:
            return
        if output is None:  # after an exception
            mine.forward = None
            return
        for index, guard in enumerate(self._group.guards):
            if index not in forward.evidence:
                raise UserError(
                    f"`hook_point` {guard.hook_point!r} must run in each forward pass, but the "
                    "model skipped it; choose a layer that always runs."
                )
        forward.finished = True
        if torch.is_grad_enabled():
            self._trained = forward
        else:
            forward.seen.clear()
        self._last = mine.last = forward
        mine.num_passes += 1
        cache = output.get("past_key_values") if isinstance(output, ModelOutput) else None
        if cache is None:
            cache = named_arguments(module, args, kwargs).get("past_key_values")
        evidence = [forward.evidence[index] for index in range(len(self._group.guards))]
        self.memory.remember(cache, evidence, forward.num_positions)


def _replica(module: nn.Module) -> UserError:
    return UserError(
        "a guarded model must run as it is, got a replica or a copy of its "
        f"{type(module).__name__}; use DistributedDataParallel in the place of DataParallel."
    )
