"""The `dsg` command: a dispatcher that imports a command's machinery only when it runs."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

from dsg.cli.environment import prepare_environment
from dsg.cli.process import Terminated, disk_full_behind, interrupts_raised
from dsg.errors import UserError, did_you_mean
from dsg.io import check_ranks, is_rank_zero

# What a shell reports for a process ended by Ctrl-C and by SIGTERM.
INTERRUPTED, TERMINATED = 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    A `UserError` becomes one line and status 2, a full disk one line and status 1, Ctrl-C and
    SIGTERM one line and status 130 and 143. Any other exception is a bug and keeps its traceback.

    Args:
        argv: Arguments after the program's name; those of the process by default. Runs on several
            ranks need the default, because the other ranks are started with the process's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    prepare_environment()
    _print_anything()
    try:
        with interrupts_raised():
            check_ranks()
            status = _dispatch(arguments)
            sys.stdout.flush()
            return status
    except UserError as error:
        rank = "" if _may_speak() else " (on another rank than zero)"
        _complain(f"error{rank}: {error}")
        return 2
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, Terminated)
        if _may_speak():
            what = "terminated" if terminated else "interrupted"
            _complain(f"{what}; {interrupt.args[0] if interrupt.args else 'start it again'}")
        return TERMINATED if terminated else INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit; nobody listens, so let it write to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        reason = disk_full_behind(error)
        if reason is None:
            raise
        notes = getattr(error, "__notes__", ["start it again"])
        _complain(f"error: {reason}; free some space and {notes[-1]}")
        return 1


def _lightning(command: str) -> Callable[[list[str]], int]:
    def run(arguments: list[str]) -> int:
        from dsg.cli import lightning_cli

        return lightning_cli.run([command, *arguments])

    return run


def _own(command: str, home: str | None = None) -> Callable[[list[str]], int]:
    def run(arguments: list[str]) -> int:
        module = import_module(f"dsg.cli.{home or command}")
        parser = _Parser(prog=f"dsg {command}", description=COMMANDS[command][0])
        module.add_arguments(parser)
        return module.run(parser.parse_args(arguments)) or 0

    return run


def _report(arguments: list[str]) -> int:
    parser = _Parser(prog="dsg report", description=COMMANDS["report"][0])
    parser.add_argument("run_dir", metavar="RUN_DIR", help="directory of a finished run")
    run_dir = parser.parse_args(arguments).run_dir
    from dsg.cli.options import writing
    from dsg.report import build_report

    with writing(f"the report of run_dir {run_dir!r}"):
        page = build_report(run_dir)
    print(page)
    return 0


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "fit": ("train: pretraining, unlearning, relearning attacks, sequences", _lightning("fit")),
    "validate": ("select features and calibrate a guard, or validate", _lightning("validate")),
    "test": ("evaluate a model with and without its guard", _lightning("test")),
    "predict": (
        "say what a guard decides about each text of a file",
        _lightning("predict"),
    ),
    "check": ("say whether an SAE fits a model, before any experiment", _own("check")),
    "demo": (
        "the whole loop on the embedded benchmark or on your own text",
        _own("demo", "demo.command"),
    ),
    "bench": (
        "measure a guard's cost, and evaluation beside lm-evaluation-harness",
        _own("bench", "bench.command"),
    ),
    "grid": (
        "tune, compare and attack methods over seeds, in parallel",
        _own("grid", "grid.command"),
    ),
    "compare": ("paired tests between two runs on the same items", _own("compare")),
    "report": ("write report.html from the results of a run", _report),
}


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        known = did_you_mean(command, COMMANDS) or f"; choose one of {', '.join(COMMANDS)}."
        raise UserError(f"Unknown command {command!r}{known}")
    return COMMANDS[command][1](rest)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {description}" for name, (description, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dsg COMMAND ...",
            "",
            "Train and adversarially evaluate language models guarded by sparse autoencoders.",
            "",
            "commands:",
            *lines,
            "",
            "dsg fit|validate|test|predict -c configs/....yaml runs one configuration;",
            "dsg COMMAND --help lists the options of a command.",
        ]
    )


def _print_anything() -> None:
    """Signs that the terminal's encoding lacks become `?` instead of the end of the run."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _may_speak() -> bool:
    with suppress(UserError):  # nobody knows which rank this is
        return is_rank_zero()
    return True


def _complain(message: str) -> None:
    sys.stderr.write(f"dsg: {' '.join(message.split())}\n")


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option like every other mistake of the user: in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help.")
