"""What the process of a command does at its ends: quiet libraries, interrupts, a full disk."""

import contextlib
import errno
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from dsg.errors import chain
from dsg.io import is_rank_zero

_MESSAGES = (
    # Data loaders here read from memory; workers would only slow them down.
    r".*does not have many workers which may be a bottleneck",
    # The run directory holds the marker, and a resumed run its checkpoints.
    r".*Experiment logs directory .* exists and is not empty",
    r".*Checkpoint directory .* exists and is not empty",
    r".*smaller than the logging interval",
    # Frozen models are in evaluation mode on purpose, and small ones train without dropout.
    r".*module\(s\) in eval mode at the start of training",
    # Lightning's and PEFT's own use of other libraries.
    r".*is_gradient_checkpointing. is deprecated",
    r".*LeafSpec.* is deprecated",
)


def calm_libraries() -> None:
    """Silence what Lightning and W&B say on every run; warnings that tell something stay."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)
    import transformers

    # Bars for reading a folder; downloads keep theirs.
    transformers.utils.logging.disable_progress_bar()
    # A run needs no tracker, and where W&B does not work its logger says so.
    if is_rank_zero():
        with contextlib.suppress(Exception):
            import wandb

            # Lightning passes an option that W&B has retired, and W&B complains about it before it
            # has read WANDB_SILENT, unless it is set up beforehand.
            wandb.setup()


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


# The disk, the user's share of it, or what a process may write at most.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors reports in words, and so does torch's writer of archives.
_IN_WORDS = re.compile(rf"os error ({'|'.join(map(str, _FULL))})\b")


def disk_full_behind(error: BaseException) -> str | None:
    """What a full disk did not let be written, in a sentence; None for any other error."""
    for cause in chain(error):
        if isinstance(cause, OSError) and cause.errno in _FULL:
            place = f" {os.fspath(cause.filename)!r}" if isinstance(cause.filename, str) else ""
            return f"no space is left to write{place} ({os.strerror(cause.errno)})"
        match = _IN_WORDS.search(str(cause))
        if match is not None:
            return f"no space is left to write ({os.strerror(int(match[1]))})"
    return None
