"""`dsg bench`: what a guard costs, on random weights of a model's shapes; see `bench_harness`."""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsg.cli.bench import harness_command as bench_harness
from dsg.cli.bench.tables import machine_facts, print_table
from dsg.cli.options import check_json, writing
from dsg.errors import UserError, check_seeds

if TYPE_CHECKING:
    from rich.console import Console

MIN_TOKENS = 16
REPEATS, FAST_REPEATS = 7, 3
MEMORY_TOKENS, FAST_MEMORY_TOKENS = [50_000, 500_000], [5_000, 50_000]
TARGET_RATIO = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `dsg bench`."""
    benches = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)
    summary = "a guard's edit, its share of a forward pass, and the cost of selection"
    guard = benches.add_parser(
        "guard",
        help=summary,
        description=f"Measures {summary}, on random weights with gemma-2-2b's shapes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    guard.add_argument("--d_in", type=int, default=2304, help="width of the residual stream")
    guard.add_argument("--d_sae", type=int, default=16384, help="features of the SAE")
    guard.add_argument("--num_features", type=int, default=20, help="features of the guard")
    guard.add_argument(
        "--tokens", type=int, nargs="+", default=[512, 1024], help="lengths of the sequences"
    )
    guard.add_argument(
        "--memory_tokens",
        type=int,
        nargs="+",
        help="amounts of text whose selection's memory is measured (default: "
        f"{MEMORY_TOKENS}, or {FAST_MEMORY_TOKENS} with --fast)",
        default=argparse.SUPPRESS,
    )
    guard.add_argument(
        "--repeats",
        type=int,
        help="timed repeats, of which the median counts (default: "
        f"{REPEATS}, or {FAST_REPEATS} with --fast)",
        default=argparse.SUPPRESS,
    )
    guard.add_argument("--fast", action="store_true", help="fewer repeats and less text")
    guard.add_argument("--seed", type=int, default=0, help="of weights, tokens and selection")
    guard.add_argument("--json", type=Path, metavar="FILE", help="write the measurements here too")
    bench_harness.add_parser(benches)


def run(options: argparse.Namespace) -> int:
    """Measure, and print the tables.

    Returns:
        0 if all outputs agreed as they must, else 1.

    Raises:
        UserError: An option is out of range.
    """
    return bench_harness.run(options) if options.bench == "harness" else _run_guard(options)


def _run_guard(options: argparse.Namespace) -> int:
    if "repeats" not in options:
        options.repeats = FAST_REPEATS if options.fast else REPEATS
    if "memory_tokens" not in options:
        options.memory_tokens = FAST_MEMORY_TOKENS if options.fast else MEMORY_TOKENS
    _check(options)
    from rich.console import Console

    from dsg.io import write_atomically

    measured = {"machine": machine_facts(), "options": _plain(options), **_measure(options)}
    _print_tables(measured, Console())
    if options.json is not None:
        with writing("--json"):
            write_atomically(options.json, json.dumps(measured, indent=2, sort_keys=True) + "\n")
    return 0 if measured["outputs_agree"] else 1


def _check(options: argparse.Namespace) -> None:
    least = {"d_in": 8, "d_sae": 1, "num_features": 1, "repeats": 1}
    least |= {"tokens": MIN_TOKENS, "memory_tokens": 1}
    for name, minimum in least.items():
        value = getattr(options, name)
        if min(value if isinstance(value, list) else [value]) < minimum:
            raise UserError(f"--{name} must be at least {minimum}, got {value}; raise it.")
    if options.num_features > options.d_sae:
        raise UserError(
            f"--num_features must be at most --d_sae {options.d_sae}, got {options.num_features}; "
            "lower it."
        )
    check_seeds("--seed", [options.seed])
    check_json(options.json)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements, one phase after the other, with a bar on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    from dsg.cli.bench.edit import measure_edit, random_sae
    from dsg.cli.bench.layer import measure_layer, random_model
    from dsg.cli.bench.selection import measure_early_stop, measure_memory

    k, repeats, seed = options.num_features, options.repeats, options.seed
    num_phases = 2 * len(options.tokens) + len(options.memory_tokens) + 1
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("bench guard", total=num_phases)

        def phase(title: str, measure: Callable[[], Any]) -> dict[str, Any]:
            progress.update(bar, description=title)
            start = time.monotonic()
            result = asdict(measure())
            progress.advance(bar)
            progress.console.print(f"{title}: {time.monotonic() - start:.0f} s", highlight=False)
            return result

        # First: the large weights of the other parts would fill the memory meanwhile.
        memory = [
            phase(f"selection, {n} tokens", lambda n=n: measure_memory(n, options.d_sae, seed))
            for n in options.memory_tokens
        ]
        early_stop = phase("early stop", lambda: measure_early_stop(repeats, seed))
        model = random_model(options.d_in, seed)
        layer = [
            phase(f"layer, {n} tokens", lambda n=n: measure_layer(model, k, n, repeats, seed))
            for n in options.tokens
        ]
        sae = random_sae(options.d_in, options.d_sae, seed)
        edit = [
            phase(f"edit, {n} tokens", lambda n=n: measure_edit(sae, k, n, repeats, seed))
            for n in options.tokens
        ]
    increases = [row["increase_bytes"] for row in memory]
    return {
        "edit": edit,
        "layer": layer,
        "memory": memory,
        "memory_growth": max(increases) / max(1, min(increases)) - 1,
        "early_stop": early_stop,
        "outputs_agree": early_stop["identical"]
        and all(row["untriggered_identical"] and row["triggered_differs"] for row in layer),
    }


def _print_tables(measured: dict[str, Any], console: "Console") -> None:
    options, machine = measured["options"], measured["machine"]
    shapes = f"d_in {options['d_in']}, d_sae {options['d_sae']}, {options['num_features']} features"
    active = measured["edit"][0]["num_active"]
    print_table(
        console,
        f"Dense edit / guard's edit, one triggered sequence ({shapes}, L0 {active:.0f})",
        ("tokens", "ratio", "range", "difference", "in eps", "dense error", "guard error"),
        [
            (
                str(row["num_tokens"]),
                f"{row['ratio']:.3g}x",
                f"{row['lowest_ratio']:.3g}-{row['highest_ratio']:.3g}x",
                f"{row['difference']:.1e}",
                f"{row['difference_in_eps']:.1f}",
                f"{row['dense_error']:.1e}",
                f"{row['sliced_error']:.1e}",
            )
            for row in measured["edit"]
        ],
        f"Target: {TARGET_RATIO}x at 1024 tokens on a CPU. Eps: float32 rounding of the largest "
        "output. Errors: against the dense edit in float64. Medians: "
        + "; ".join(
            f"{row['dense_seconds'] * 1e3:.1f} ms / {row['sliced_seconds'] * 1e3:.2f} ms"
            for row in measured["edit"]
        )
        + ".",
    )
    print_table(
        console,
        "Guard / one decoder layer of gemma-2-2b's proportions",
        ("tokens", "untriggered", "triggered", "untriggered output"),
        [
            (
                str(row["num_tokens"]),
                f"{row['untriggered_share']:.2%}",
                f"{row['triggered_share']:.2%}",
                "bit-identical" if row["untriggered_identical"] else "DIFFERS",
            )
            for row in measured["layer"]
        ],
        "All of the guard's hooks, in the same passes as the layer. Layer: "
        + "; ".join(f"{row['layer_seconds'] * 1e3:.1f} ms" for row in measured["layer"])
        + ".",
    )
    print_table(
        console,
        "Memory of selection",
        ("tokens", "peak increase", "all activations", "time"),
        [
            (
                str(row["num_tokens"]),
                f"{row['increase_bytes'] / 1e6:.1f} MB",
                f"{row['all_activations_bytes'] / 1e9:.2f} GB",
                f"{row['seconds']:.0f} s",
            )
            for row in measured["memory"]
        ],
        f"Highest over lowest: +{measured['memory_growth']:.1%}. Measured with d_in "
        f"{measured['memory'][0]['d_in']}; a larger one enlarges the weights only. A fresh process "
        "each; all activations: what float32 of every token would take.",
    )
    stop = measured["early_stop"]
    console.print(
        f"[bold]Early stop[/bold] behind layer {stop['hook_layer']} of {stop['num_layers']} (from "
        f"0): {stop['ratio']:.2f}x the tokens/s of whole passes "
        f"({stop['stopped_tokens_per_second']:.0f} / {stop['whole_tokens_per_second']:.0f}), "
        f"{'the same activations' if stop['identical'] else 'OTHER ACTIVATIONS'}.\n",
        highlight=False,
    )
    console.print(
        f"torch {machine['torch']}, {machine['threads']} of {machine['cores']} cores, load "
        f"before the run {machine['load']}; medians of {options['repeats']} interleaved repeats.",
        highlight=False,
    )


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    names = ("d_in", "d_sae", "num_features", "tokens", "memory_tokens", "repeats", "seed")
    return {name: getattr(options, name) for name in names}
