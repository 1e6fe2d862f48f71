"""`dsg grid`: one file and one command for many runs; its work lies in modules slow to import."""

import argparse
from pathlib import Path

from dsg.cli.environment import available_cpus
from dsg.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `dsg grid`."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument(
        "config", metavar="CONFIG", type=Path, help="a grid file, such as configs/grids/*.yaml"
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="one seed, one value of everything, one epoch and few texts: a look at the whole grid",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=available_cpus(),
        help="processes that run cells side by side, one thread each",
    )
    parser.add_argument(
        "--run_dir",
        type=Path,
        default=argparse.SUPPRESS,
        help="where to write (default: runs/<name of the grid file>, with _fast added for --fast)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier run in run_dir"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue an earlier run: finished cells stay unless the grid changes them",
    )


def run(options: argparse.Namespace) -> int:
    """Run a grid and print its table.

    Returns:
        0, or 1 if a cell has failed.

    Raises:
        UserError: The grid file or an option is wrong, or the run directory cannot be used.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the message tells how to continue.
    """
    if options.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {options.jobs}.")
    from rich.console import Console

    from dsg.cli.grid.file import read_grid
    from dsg.cli.grid.run import run_grid
    from dsg.cli.lightning_cli import run_name
    from dsg.cli.process import calm_libraries, resumable
    from dsg.io.run_directory import run_directory

    grid = read_grid(options.config)
    grid = grid.fast() if options.fast else grid
    name = run_name(options.config)
    default = Path("runs") / f"{name}{'_fast' * options.fast}"
    run_dir = getattr(options, "run_dir", default)
    calm_libraries()
    claim = run_directory(run_dir, overwrite=options.overwrite, resume=options.resume)
    with claim as folder, resumable():
        return run_grid(grid, options.config, folder.resolve(), options.jobs, Console())
