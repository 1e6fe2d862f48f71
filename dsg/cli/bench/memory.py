"""How much memory a process has ever held."""

import sys
from contextlib import suppress
from pathlib import Path


def highest_memory() -> int:
    """The most memory that was ever resident in this process, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        # Not on Linux: a child begins with its parent's peak there.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def forget_highest_memory() -> None:
    """Let `highest_memory` begin anew with what is resident now, where the system can do that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
