"""The calls of a guarded model that are running, thread by thread."""

import threading
from collections.abc import Callable

from torch import Tensor, nn

from dsg.guard.panel import ForwardPass


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
    """

    def __init__(self, when_done: Callable[[], None]) -> None:
        self.mine = ThreadState()
        self._when_done = when_done
        self._open = True
        self._threads: set[int] = set()
        self._lock = threading.RLock()

    @property
    def is_open(self) -> bool:
        """Whether calls that begin now are followed."""
        return self._open

    @property
    def is_following(self) -> bool:
        """Whether a call of this thread is followed."""
        return bool(self.mine.running)

    def begin(self, what: object, reopen: Callable[[], None] | None = None) -> bool:
        """Notes that something begins in this thread.

        Args:
            what: A module, or any other object for a call of `generate`.
            reopen: Called if the guard has been closed, to follow this call nevertheless.

        Returns:
            Whether the guard follows it.
        """
        running = self.mine.running
        if what in running:
            # A compiled module ends with an exception without a word.
            self.end(what)
        if not running:
            with self._lock:
                if not self._open and reopen is None:
                    return False
                if not self._open and not self._threads and reopen is not None:
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
            self._open = False
            if all(isinstance(what, nn.Module) for what in self.mine.running):
                # No forward pass leaves a `with` block around it: an exception left these behind.
                self.mine.running.clear()
                self._threads.discard(threading.get_ident())
            self._finish()

    def _finish(self) -> None:
        if not self._open and not self._threads:
            self._when_done()
