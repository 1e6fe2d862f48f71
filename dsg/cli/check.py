"""`dsg check`: whether an SAE fits a model, before anything is built on it."""

import argparse
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dsg.cli.options import check_json, writing
from dsg.errors import UserError
from dsg.selection import evenly

if TYPE_CHECKING:
    from rich.table import Table

    from dsg.sae import Fit, Verdict

DOES_NOT_FIT = 1  # exit status; 2 is a mistake of the user, as for every command
# Texts about the benchmark's first hazard beside those of the distant domains.
_FORGET_DOMAIN = "pathogen"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `dsg check`."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.epilog = "Exit status: 0 if it fits or is doubtful, 1 if it does not fit, 2 on an error."
    fit = parser.add_argument_group("what is to fit")
    fit.add_argument(
        "--model",
        metavar="NAME_OR_FOLDER",
        help="hub name or folder of a causal LM, or tiny_world:SEED/model for the embedded one",
        required=True,
        default=argparse.SUPPRESS,
    )
    fit.add_argument(
        "--sae",
        metavar="RELEASE_OR_FOLDER",
        help="release of SAELens's list (with --sae_id) or folder, or tiny_world:SEED/sae",
        required=True,
        default=argparse.SUPPRESS,
    )
    fit.add_argument("--sae_id", metavar="ID", help="id within the release; none for a folder")
    fit.add_argument(
        "--hook_point",
        metavar="blocks.N.hook_resid_post",
        help="where the SAE is to read: the output of decoder layer N, or a module path",
        required=True,
        default=argparse.SUPPRESS,
    )
    fit.add_argument(
        "--clamp_value",
        type=float,
        default=-500.0,
        help="clamp whose size is compared with the residual norm, in SAE activations",
    )
    text = parser.add_argument_group("text to measure on")
    text.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="plain text, a passage per paragraph, or JSONL, a passage per line; needed unless "
        "the model is the embedded one, whose forget and retain documents are taken",
    )
    text.add_argument(
        "--max_texts", type=int, default=200, help="passages to use, evenly out of all"
    )
    text.add_argument("--max_length", type=int, default=256, help="tokens to use of a passage")
    text.add_argument("--batch_size", type=int, default=8, help="passages per forward pass")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")


def run(options: argparse.Namespace) -> int:
    """Measure, print a table and the verdict.

    Returns:
        0 if the SAE fits or is doubtful, 1 if it does not fit.

    Raises:
        UserError: Something cannot be loaded, does not go together, or there is no text.
    """
    if options.max_texts < 1:
        raise UserError(f"--max_texts must be at least 1, got {options.max_texts}; raise it.")
    # Before anything is loaded: a missing file should not cost a minute.
    check_json(options.json)
    for name in ("max_length", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}; raise it.")
    if not math.isfinite(options.clamp_value):
        raise UserError(f"--clamp_value must be finite, got {options.clamp_value}; try -500.")
    texts = _texts(options)

    import torch
    from rich.console import Console
    from rich.progress import track

    from datamodules.parts.loading import load_tokenizer
    from dsg.cli.lightning_cli import resolve_benchmark
    from dsg.cli.process import calm_libraries
    from dsg.io import write_atomically
    from dsg.lm import check_width, load_model, resolve_hook_point
    from dsg.sae import check_fit, load_sae, verdict
    from dsg.selection import corpus_batches

    calm_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model_folder = resolve_benchmark(options.model)
    model = load_model(model_folder)
    model.to(device)  # pyright: ignore[reportArgumentType]
    resolve_hook_point(model, options.hook_point)
    sae = load_sae(resolve_benchmark(options.sae), options.sae_id, device=str(device))
    check_width(model, sae.cfg.d_in)
    batches = corpus_batches(
        load_tokenizer(model_folder), texts, options.max_length, options.batch_size
    )
    console = Console()
    fit = check_fit(
        model,
        sae,
        options.hook_point,
        track(batches, "measuring", console=console, transient=True),
        clamp_value=options.clamp_value,
        model_name=_model_name(options.model),
    )
    judged = verdict(fit)
    console.print(_table(fit, options))
    console.print(f"verdict: {judged.outcome}", style="bold", highlight=False)
    for reason in judged.reasons:
        console.print(f"- {reason}", markup=False, highlight=False)
    if options.json is not None:
        with writing("--json"):
            write_atomically(options.json, _json(options, len(texts), fit, judged))
    return DOES_NOT_FIT if judged.outcome == "does not fit" else 0


def _texts(options: argparse.Namespace) -> list[str]:
    seed = _benchmark_seed(options.model)
    if options.text is not None:
        texts = [text for path in options.text for text in _passages(path)]
    elif seed is not None:
        from datamodules.tiny_world.texts import TinyWorldTexts

        world = TinyWorldTexts(seed, _FORGET_DOMAIN)
        texts = world.retain_texts() + world.forget_texts()
    else:
        raise UserError(
            "--text is needed for any model but the embedded one, got none; give files of the "
            "kind of text that the guard is to see."
        )
    # So that every file and kind of text has its share.
    return evenly(texts, options.max_texts)


def _passages(path: Path) -> list[str]:
    from datamodules.text_files.files import paragraphs_of

    passages = [" ".join(words) for words in paragraphs_of(path) if words]
    if not passages:
        raise UserError(f"The file {str(path)!r} is empty; give one with text.")
    return passages


def _benchmark_seed(model: str) -> int | None:
    match = re.fullmatch(r"tiny_world:(\d+)/model", model)
    return int(match[1]) if match else None


def _model_name(model: str) -> str:
    """What SAEs record as the model's name: the benchmark's without `/model`."""
    return model if _benchmark_seed(model) is None else model.removesuffix("/model")


def _table(fit: "Fit", options: argparse.Namespace) -> "Table":
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from dsg.sae import fit as check

    sae = f"{options.sae} {options.sae_id or ''}".strip()
    clamp = "–" if fit.clamp_ratio is None else f"{fit.clamp_ratio:.3g}"
    recovered = "–" if fit.loss_recovered is None else f"{fit.loss_recovered:.4f}"
    rows = [
        ("features x width", f"{fit.d_sae} x {fit.d_in}", ""),
        ("hook point the SAE records", *_recorded(fit.recorded_hook_point, fit.hook_point_agrees)),
        ("model the SAE records", *_recorded(fit.recorded_model, fit.model_agrees)),
        ("counted tokens", f"{fit.num_tokens}", f"from {check.MIN_TOKENS}"),
        ("variance unexplained (FVU)", f"{fit.fvu:.4f}", f"up to {check.DOUBTFUL_FVU:g}"),
        (
            "active features per token (L0)",
            f"{fit.l0:.2f}",
            f"{check.UNFIT_L0:g} to {check.DOUBTFUL_L0_OF_WIDTH * fit.d_in:g}",
        ),
        (
            f"dead on these {fit.num_tokens} tokens",
            f"{fit.num_dead} ({fit.dead_share:.1%})",
            f"up to {check.DOUBTFUL_DEAD_SHARE:.0%}",
        ),
        ("loss of the model, nats per token", f"{fit.loss:.4f}", ""),
        (
            "  added by the reconstruction",
            f"{fit.loss_added:+.4f}",
            f"up to {check.DOUBTFUL_LOSS_ADDED:g}",
        ),
        (
            "  added by zeros instead",
            f"{fit.ablation_loss_added:+.4f}",
            f"from {check.MIN_ABLATION_COST:g}",
        ),
        ("  fraction of loss recovered", recovered, f"from {check.DOUBTFUL_RECOVERED:g}"),
        ("mean residual norm", f"{fit.mean_residual_norm:.4g}", ""),
        (
            f"clamp to {fit.clamp_value:g}, in residual norms",
            clamp,
            f"{check.MIN_CLAMP_RATIO:g} to {check.MAX_CLAMP_RATIO:g}",
        ),
    ]
    table = Table(
        title=escape(f"{sae} at {options.hook_point} of {options.model}"),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("measure", no_wrap=True)
    table.add_column("value", justify="right", overflow="fold")
    table.add_column("usual")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _recorded(recorded: str | None, agrees: bool | None) -> tuple[str, str]:
    if recorded is None:
        return "none", ""
    return recorded, {True: "as given", False: "differs", None: "unknown"}[agrees]


def _json(options: argparse.Namespace, num_texts: int, fit: "Fit", judged: "Verdict") -> str:
    content = {
        "model": options.model,
        "sae": options.sae,
        "sae_id": options.sae_id,
        "hook_point": options.hook_point,
        "num_texts": num_texts,
        **asdict(fit),
        "dead_share": fit.dead_share,
        "loss_recovered": fit.loss_recovered,
        "verdict": judged.outcome,
        "reasons": judged.reasons,
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"
