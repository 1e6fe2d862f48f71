"""Ctrl-C and SIGTERM reach the caller of a run as `KeyboardInterrupt`."""

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from dsg.cli.disk_full import disk_full_behind


class Terminated(KeyboardInterrupt):
    """SIGTERM: a batch system, a container or a service manager ends this process."""


@contextmanager
def interrupts_raised() -> Iterator[None]:
    """Raise at SIGTERM as at Ctrl-C, and turn Lightning's answer to either back.

    The Trainer tears down and calls `sys.exit(1)`: from outside that looks like any other failure.
    So note whether a signal came. A SIGTERM that follows another one changes nothing: the run ends
    already.

    Raises:
        KeyboardInterrupt: The block ended because of Ctrl-C.
        Terminated: The block ended because of SIGTERM.
    """
    came: list[type[KeyboardInterrupt]] = []

    def note(number: int, frame: FrameType | None) -> None:
        outer = before[number]
        repeated = Terminated in came
        came.append(KeyboardInterrupt if number == signal.SIGINT else Terminated)
        if callable(outer):
            outer(number, frame)
        elif not repeated:
            raise Terminated

    before: dict[int, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if callable(handler) or (number == signal.SIGTERM and handler == signal.SIG_DFL):
            before[number] = handler
            signal.signal(number, note)
        # Otherwise it is ignored, as Ctrl-C in a background job of a script.
    try:
        yield
    except SystemExit:
        if came:
            raise came[-1] from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def resumable() -> Iterator[None]:
    """Let what ends the block tell that this process's command continues with `--resume`.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; its argument tells.
    """
    words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    sentence = f"continue with: {shlex.join(['dsg', *words, '--resume'])}"
    try:
        with interrupts_raised():
            yield
    except KeyboardInterrupt as interrupt:
        interrupt.args = (sentence,)
        raise
    except Exception as error:
        if disk_full_behind(error):
            error.add_note(sentence)
        raise
