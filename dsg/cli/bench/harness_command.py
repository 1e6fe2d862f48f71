"""`dsg bench harness`: multiple choice beside lm-evaluation-harness, on the same questions."""

import argparse
import json
from dataclasses import asdict
from operator import truediv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsg.cli.bench.tables import machine_facts, print_table
from dsg.errors import UserError, check_seeds

if TYPE_CHECKING:
    from rich.console import Console

QUESTIONS, FAST_QUESTIONS = 64, 16
REPEATS, FAST_REPEATS = 7, 3
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
# How far a log-probability may be from the harness's, in nats.
TOLERANCE = 1e-4
_TITLES = {
    "letter": "Letter questions: four letters after a prompt of 60 to 200 words",
    "cloze": "Cloze questions: four options of 1 to 8 words after such a prompt",
}


def add_parser(benches: Any) -> None:
    """Add `harness` to the benches of `dsg bench`."""
    summary = "speed and memory of multiple choice beside lm-evaluation-harness"
    parser = benches.add_parser(
        "harness",
        help=summary,
        description=f"Measures {summary} at the fastest batch size of either, on a random Gemma 2.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--d_model", type=int, default=256, help="width of the model")
    parser.add_argument("--num_layers", type=int, default=6, help="decoder layers of the model")
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=8192,
        help="tokens of the model; by default they take a quarter of its multiplications, about "
        "as gemma-2-2b's do",
    )
    parser.add_argument(
        "--questions",
        type=int,
        help=f"of each kind (default: {QUESTIONS}, or {FAST_QUESTIONS} with --fast)",
        default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--batch_sizes",
        type=_batch_size,
        nargs="+",
        default=list(BATCH_SIZES),
        help="to choose from, ascending, on either side; `auto` is each side's own choice",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        help="timed repeats, of which the median counts (default: "
        f"{REPEATS}, or {FAST_REPEATS} with --fast)",
        default=argparse.SUPPRESS,
    )
    parser.add_argument("--fast", action="store_true", help="fewer repeats and questions")
    parser.add_argument("--seed", type=int, default=0, help="of weights and words")
    parser.add_argument("--run_dir", metavar="DIR", help="write bench.json there too")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in DIR")


def run(options: argparse.Namespace) -> int:
    """Measure, and print the tables.

    Returns:
        0 if both sides gave the same answers, else 1.

    Raises:
        UserError: An option is out of range, or the harness is not installed.
    """
    if "repeats" not in options:
        options.repeats = FAST_REPEATS if options.fast else REPEATS
    if "questions" not in options:
        options.questions = FAST_QUESTIONS if options.fast else QUESTIONS
    _check(options)
    if options.run_dir is None:
        return _run(options, None)
    from dsg.io.run_directory import run_directory

    with run_directory(options.run_dir, overwrite=options.overwrite) as directory:
        return _run(options, directory)


def _run(options: argparse.Namespace, directory: Path | None) -> int:
    from rich.console import Console

    from dsg.io import write_atomically

    named = ("d_model", "num_layers", "vocab_size", "questions", "batch_sizes", "repeats", "seed")
    measured = {
        "machine": machine_facts(),
        "options": {name: getattr(options, name) for name in named},
        "comparisons": _measure(options),
    }
    measured["answers_agree"] = all(
        comparison["same_answers"] and comparison["largest_difference"] < TOLERANCE
        for comparison in measured["comparisons"]
    )
    _print_tables(measured, Console())
    if directory is not None:
        text = json.dumps(measured, indent=2, sort_keys=True) + "\n"
        write_atomically(directory / "bench.json", text)
    return 0 if measured["answers_agree"] else 1


def _check(options: argparse.Namespace) -> None:
    import dsg.evaluation.benchmarks.harness  # noqa: F401 - says how to install the harness, if it is missing
    from dsg.cli.bench.questions import FEWEST_TOKENS

    check_seeds("--seed", [options.seed])
    least = {"d_model": 8, "num_layers": 1, "vocab_size": FEWEST_TOKENS}
    least |= {"questions": 1, "repeats": 1}
    for name, minimum in least.items():
        value = getattr(options, name)
        if value < minimum:
            raise UserError(f"--{name} must be at least {minimum}, got {value}; raise it.")
    if options.d_model % 8:
        raise UserError(
            f"--d_model must be a multiple of 8, got {options.d_model}; change it to "
            f"{options.d_model // 8 * 8}."
        )
    numbers = [size for size in options.batch_sizes if size != "auto"]
    if numbers != sorted(set(numbers)) or "auto" in options.batch_sizes[:-1]:
        given = " ".join(map(str, options.batch_sizes))
        raise UserError(f"--batch_sizes must ascend, `auto` last, got {given}; sort them.")


def _batch_size(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 or `auto`, got {text!r}")
    return int(text)


def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import Progress

    from dsg.cli.bench.harness import compare
    from dsg.cli.bench.questions import Workload

    shapes = (options.d_model, options.num_layers, options.vocab_size, options.seed)
    comparisons = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("bench harness", total=len(_TITLES))
        for kind in ("letter", "cloze"):
            progress.update(bar, description=f"{kind} questions")
            workload = Workload(kind, options.questions, *shapes)
            comparisons.append(asdict(compare(workload, options.batch_sizes, options.repeats)))
            progress.advance(bar)
    return comparisons


def _print_tables(measured: dict[str, Any], console: "Console") -> None:
    options, machine = measured["options"], measured["machine"]
    for comparison in measured["comparisons"]:
        print_table(
            console,
            _TITLES[comparison["kind"]],
            ("", "batch size", "seconds", "range", "questions/s", "peak memory"),
            [
                _row("harness", comparison["harness"], comparison["num_questions"]),
                _row("dsg", comparison["ours"], comparison["num_questions"]),
                _row("dsg, same batch", comparison["ours_alike"], comparison["num_questions"]),
            ],
            _verdict(comparison),
        )
    console.print(
        f"Random Gemma 2: {options['num_layers']} layers, width {options['d_model']}, "
        f"{options['vocab_size']} tokens, float32; {options['questions']} questions of each kind. "
        "From text to answers, each side in a process of its own at the fastest of its batch "
        f"sizes; medians of {options['repeats']} interleaved repeats; peak memory is what "
        f"answering added. torch {machine['torch']}, {machine['threads']} of {machine['cores']} "
        f"cores, load before the run {machine['load']}.",
        highlight=False,
    )


def _row(name: str, cost: dict[str, Any], num_questions: int) -> tuple[str, ...]:
    return (
        name,
        str(cost["batch_size"]),
        f"{cost['seconds']:.3g}",
        f"{cost['lowest_seconds']:.3g}-{cost['highest_seconds']:.3g}",
        f"{num_questions / cost['seconds']:.3g}",
        f"{cost['peak_bytes'] / 1e6:.1f} MB",
    )


def _share(comparison: dict[str, Any], side: str) -> float:
    """Peak memory of a side as a share of the harness's."""
    return comparison[side]["peak_bytes"] / max(1, comparison["harness"]["peak_bytes"])


def _verdict(comparison: dict[str, Any]) -> str:
    ratio, lowest, highest, difference = (
        comparison[name]
        for name in ("speed_ratio", "lowest_ratio", "highest_ratio", "largest_difference")
    )
    processor = (comparison[side]["processor_seconds"] for side in ("harness", "ours"))
    return (
        f"dsg is {ratio:.2f}x as fast ({lowest:.2f}-{highest:.2f}x; {truediv(*processor):.2f}x in "
        f"processor time) and takes {_share(comparison, 'ours'):.2f}x the memory, "
        f"{_share(comparison, 'ours_alike'):.2f}x at the same batch size. "
        f"{'The same answers' if comparison['same_answers'] else 'OTHER ANSWERS'}; "
        f"log-probabilities differ by up to {difference:.1e} nats."
    )
