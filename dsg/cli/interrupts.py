"""Ctrl-C inside a Lightning run reaches the caller as `KeyboardInterrupt`."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_raised() -> Iterator[None]:
    """Turn Lightning's answer to Ctrl-C back into `KeyboardInterrupt`.

    The Trainer tears down, ignores further SIGINTs and calls `sys.exit(1)`: from outside that looks
    like any failure. The ignored signal is the trace that tells the two apart.

    Raises:
        KeyboardInterrupt: The block ended because of Ctrl-C.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, before)
            raise KeyboardInterrupt from None
        raise
