"""Reads a grid file with the parser of all other configurations, and checks what it names."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from dsg.cli.config_errors import one_sentence
from dsg.cli.grid.file import Benchmark, Sweep, check_keys
from dsg.cli.grid.overrides import Config, merged, read_config
from dsg.errors import UserError

Grid = Sweep | Benchmark


def read_grid(path: Path) -> Grid:
    """Read a grid file; one with `methods` is a benchmark, any other one a sweep.

    Raises:
        UserError: The file cannot be read, or what it says is wrong.
    """
    raw = read_config(path)
    kind = Benchmark if "methods" in raw else Sweep
    check_keys(raw)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, None)
    try:
        parsed: Any = parser.parse_path(str(path))
    except argparse.ArgumentError as error:
        raise UserError(f"The grid {str(path)!r}: {one_sentence(str(error), 'mend it')}") from None
    return kind(**vars(parser.instantiate(parsed)))


def named_configs(grid: Grid, path: Path) -> dict[str, Config]:
    """The runnable configurations that a grid names, by `str` of what it calls them.

    Args:
        grid: What the file says.
        path: Where it lies; names are relative to its folder.

    Raises:
        UserError: One cannot be read.
    """
    return {
        str(names): merged(
            read_config(path.parent / name)
            for name in ([names] if isinstance(names, str) else names)
        )
        for names in _names(grid)
    }


def _names(grid: Grid) -> Iterable[str | list[str]]:
    if isinstance(grid, Sweep):
        return [grid.config]
    entries = (*grid.methods.values(), *grid.attacks.values(), *grid.sequences.values())
    return [entry.config for entry in entries]
