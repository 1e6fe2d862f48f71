"""`dsg compare A B`: paired tests between two runs on the same items."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dsg.cli.options import check_json, writing
from dsg.errors import UserError

if TYPE_CHECKING:
    from dsg.evaluation import Comparison, Overlap, PairedTest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `dsg compare`."""
    parser.add_argument("first", metavar="A", type=Path, help="directory of a finished evaluation")
    parser.add_argument("second", metavar="B", type=Path, help="directory of the other one")
    for name, run in (("guard_a", "A"), ("guard_b", "B")):
        parser.add_argument(
            f"--{name}",
            metavar="STATE",
            help=f"state of the guard in {run}: none, off or on (default: compare each state that "
            "both runs have with itself); give both or neither",
        )
    parser.add_argument(
        "--metric", nargs="+", default=[], help="only these values, as in the table (default: all)"
    )
    parser.add_argument("--domain", nargs="+", default=[], help="only these domains (default: all)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the comparison here too (default: nowhere)"
    )


def run(options: argparse.Namespace) -> int:
    """Print the comparison.

    Raises:
        UserError: The runs cannot be compared, or an option is wrong.
    """
    if (options.guard_a is None) != (options.guard_b is None):
        raise UserError("--guard_a and --guard_b must be given together, got only one; add it.")
    check_json(options.json)
    from dsg.evaluation import choose, compare_runs
    from dsg.io import write_atomically

    guards = None if options.guard_a is None else (options.guard_a, options.guard_b)
    comparisons, overlaps = compare_runs(options.first, options.second, guards)
    comparisons = choose(comparisons, options.metric, options.domain)
    _print(options.first, options.second, comparisons, overlaps)
    if options.json is not None:
        content = {
            "comparisons": [asdict(c) for c in comparisons],
            "items": [asdict(o) for o in overlaps],
        }
        with writing("--json"):
            write_atomically(options.json, json.dumps(content, indent=2) + "\n")
    return 0


def _print(
    first: Path, second: Path, comparisons: "list[Comparison]", overlaps: "list[Overlap]"
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"A: {first}\nB: {second}", highlight=False, markup=False)
    for overlap in overlaps:
        console.print(
            f"guard {_states(overlap.guards)}: {overlap.both} items in both, {overlap.first_only} "
            f"only in A, {overlap.second_only} only in B",
            highlight=False,
        )
    parts = dict.fromkeys((comparison.guards, comparison.kind) for comparison in comparisons)
    for guards, kind in parts:
        title = f"guard {_states(guards)}, {kind}"
        table = Table(
            title=title,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        # Names are folded where a terminal is narrow, numbers never.
        table.add_column("domain", overflow="fold", min_width=8)
        table.add_column("metric", overflow="fold", min_width=12)
        for name in ("A", "B", "B - A [95 %]", "p", "n"):
            table.add_column(name, justify="right", no_wrap=True)
        for comparison in comparisons:
            if (comparison.guards, comparison.kind) == (guards, kind):
                # A space is where a name may be folded.
                metric = comparison.metric.replace("_", " ")
                table.add_row(comparison.domain, metric, *_numbers(comparison.test))
        console.print(table)
    console.print(
        "0/1 values: exact McNemar test, Newcombe's interval; others: sign-flip permutation test, "
        f"bootstrap over items. The {len(comparisons)} p values are not corrected for their "
        "number.",
        highlight=False,
    )


def _numbers(test: "PairedTest") -> tuple[str, ...]:
    interval = "" if test.low is None else rf" \[{test.low:+.3f}, {test.high:+.3f}]"
    return (
        f"{test.first:.3f}",
        f"{test.second:.3f}",
        f"{test.difference:+.3f}{interval}",
        "<.001" if test.p < 0.001 else f"{test.p:.3f}",
        str(test.n),
    )


def _states(guards: tuple[str, str]) -> str:
    return guards[0] if guards[0] == guards[1] else f"{guards[0]} -> {guards[1]}"
