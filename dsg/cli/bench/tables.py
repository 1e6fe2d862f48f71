"""What the benches have in common: tables, facts of the machine, the highest memory."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def print_table(
    console: "Console",
    title: str,
    header: tuple[str, ...],
    rows: list[tuple[str, ...]],
    note: str,
) -> None:
    """Print a table under a bold title, with a note below."""
    from rich.table import Table

    table = Table()
    for name in header:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(f"[bold]{title}[/bold]", highlight=False)
    console.print(table)
    console.print(note + "\n", highlight=False)


def machine_facts() -> dict[str, Any]:
    """What the times depend on: torch, threads, cores, and how busy the machine is."""
    import torch

    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


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
