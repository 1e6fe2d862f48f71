"""`dsg demo`: its options; what it does lies in modules that are slow to import."""

import argparse
from pathlib import Path

from dsg.errors import UserError, check_each_once, check_seeds

FORGET_DOMAINS = ("pathogen", "malware", "toxin")
PARTS = ("evaluate", "relearn", "sequential")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `dsg demo`."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    run = parser.add_argument_group("run")
    run.add_argument("--run_dir", type=Path, default=Path("runs/demo"), help="where to write")
    run.add_argument("--overwrite", action="store_true", help="replace an earlier run in run_dir")
    run.add_argument(
        "--resume", action="store_true", help="continue an interrupted run; finished stages stay"
    )
    run.add_argument("--seeds", type=int, nargs="+", default=[0], help="world and training seeds")
    run.add_argument("--epochs", type=int, default=5, help="epochs of a relearning attack")
    world = parser.add_argument_group("embedded benchmark (the default)")
    world.add_argument(
        "--forget_domains",
        nargs="+",
        choices=FORGET_DOMAINS,
        default=argparse.SUPPRESS,
        help="hazard-like domains, each forgotten on its own (default: pathogen)",
    )
    world.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=argparse.SUPPRESS,
        help="which parts to run: methods side by side, relearning attacks, sequential requests "
        "(default: all)",
    )
    own = parser.add_argument_group("your own text, instead of the embedded benchmark")
    own.add_argument(
        "--forget", type=Path, nargs="+", metavar="FILE", help="plain text or JSONL to forget"
    )
    own.add_argument(
        "--retain", type=Path, nargs="+", metavar="FILE", help="plain text or JSONL to keep"
    )
    own.add_argument(
        "--model", metavar="NAME_OR_PATH", help="a pretrained model instead of a small new one"
    )
    own.add_argument(
        "--sae", metavar="RELEASE/ID_OR_PATH", help="the pretrained model's SAE; needs --model"
    )


def run(options: argparse.Namespace) -> int:
    """Run the demonstration that the options ask for.

    Raises:
        UserError: The options contradict each other.
    """
    if (options.forget is None) != (options.retain is None):
        raise UserError(
            "--forget and --retain belong together, got only one of them; give files for both."
        )
    if (options.model is None) != (options.sae is None):
        raise UserError(
            "--model and --sae belong together, got only one of them; give both or neither."
        )
    if options.model is not None and options.forget is None:
        raise UserError("--model and --sae need text: give --forget and --retain as well.")
    check_seeds("--seeds", options.seeds)
    for name, default in (("forget_domains", ["pathogen"]), ("parts", list(PARTS))):
        if name in options and options.forget is not None:
            raise UserError(
                f"--{name} is of the embedded benchmark and means nothing for your own text; leave "
                "it out, or leave --forget and --retain out."
            )
        setattr(options, name, getattr(options, name, default))
        check_each_once(f"--{name}", getattr(options, name))
    if options.epochs < 1:
        raise UserError(f"--epochs must be at least 1, got {options.epochs}.")
    if options.forget is not None:
        from dsg.cli.demo import text

        return text.run(options)
    from dsg.cli.demo import world

    return world.run(options)
