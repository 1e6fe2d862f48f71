"""Ctrl-C inside a Lightning run reaches the caller as `KeyboardInterrupt`."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_raised() -> Iterator[None]:
    """Turn Lightning's answer to Ctrl-C back into `KeyboardInterrupt`.

    The Trainer tears down and calls `sys.exit(1)`: from outside that looks like any other failure.
    So note whether the signal came.

    Raises:
        KeyboardInterrupt: The block ended because of Ctrl-C.
    """
    outer = signal.getsignal(signal.SIGINT)
    if not callable(outer):  # ignored, as in a background job of a script
        yield
        return
    interrupted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        outer(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except SystemExit:
        if interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, outer)
