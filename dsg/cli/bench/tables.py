"""What the benches print and write down alike."""

import os
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
