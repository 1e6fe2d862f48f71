"""From texts to a calibrated guard: statistics, selection, calibration, held-out check."""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dsg.calibration import calibrate_threshold, false_positive_rate
from dsg.edit import ClampScope
from dsg.errors import UserError
from dsg.guard import ClampUnit, Guard
from dsg.hooks import check_width, resolve_hook_point, unwrap
from dsg.sae import slice_features
from dsg.selection import select_fisher_ratio
from dsg.statistics import Importance, collect_statistics, corpus_batches
from dsg.tokens import uncounted_token_ids

if TYPE_CHECKING:
    from sae_lens import SAE

RETAIN_FRACTIONS = (0.5, 0.25, 0.25)
FORGET_FRACTIONS = (0.75, 0.25)
_LIBRARIES = ("dynamic-sae-guardrails", "torch", "transformers", "sae-lens")


def build_guard(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sae: "SAE[Any]",
    forget_texts: Iterable[str],
    retain_texts: Iterable[str],
    *,
    hook_point: str,
    num_features: int = 20,
    ratio_percentile: float = 95.0,
    threshold_percentile: float = 95.0,
    clamp_value: float = -500.0,
    clamp_scope: ClampScope = "all",
    clamp_unit: ClampUnit = "activation",
    importance: Importance = "mean_square",
    calibration_texts: Iterable[str] | None = None,
    heldout_texts: Iterable[str] | None = None,
    max_length: int | None = 1024,
    batch_size: int = 32,
) -> Guard:
    """Builds a guard for one forget request.

    Forget texts are split 75/25 into selection and held-out, retain texts 50/25/25 into selection,
    calibration and held-out, by SHA-256 of the text. Where calibration or held-out texts are given,
    the retain texts' own share goes to selection.

    Args:
        model: The language model, possibly wrapped.
        tokenizer: Its tokenizer.
        sae: A standard or JumpReLU SAE of the hook point.
        forget_texts: What is to be forgotten, one sequence each.
        retain_texts: What must stay untouched, one sequence each.
        hook_point: Where the SAE reads, such as `blocks.3.hook_resid_post`.
        num_features: Features to select (n_feats).
        ratio_percentile: Percentile of the score ratio to reach, in [0, 100] (p_ratio).
        threshold_percentile: Percentile of calibration densities, in [0, 100] (p_dyn).
        clamp_value: Value written to the features, sign included (-c).
        clamp_scope: Write all selected features where any is active, or only the active ones.
        clamp_unit: SAE activations, or multiples of the mean residual norm of calibration text.
        importance: Which score ranks the features.
        calibration_texts: Retain texts that set the threshold.
        heldout_texts: Retain texts that measure the false-positive rate.
        max_length: Longest sequence, in tokens.
        batch_size: Sequences per forward pass.

    Returns:
        A guard on the CPU, whose `facts` tell how it was made.

    Raises:
        UserError: If SAE, model and hook point do not fit, a split is empty, splits share a text,
            or an argument is out of range.
    """
    check_width(model, sae.cfg.d_in)
    resolve_hook_point(model, hook_point)
    splits = _split(forget_texts, retain_texts, calibration_texts, heldout_texts)

    def collect(texts: list[str]) -> Any:
        batches = corpus_batches(tokenizer, texts, max_length, batch_size)
        return collect_statistics(model, sae, hook_point, batches)

    selection = select_fisher_ratio(
        collect(splits["forget_selection"]),
        collect(splits["retain_selection"]),
        num_features,
        ratio_percentile,
        importance,
    )
    guard = Guard(
        slice_features(sae, selection.feature_ids).on(torch.device("cpu")),
        hook_point=hook_point,
        uncounted_ids=uncounted_token_ids(tokenizer),
        pad_id=tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else None,
        threshold=1.0,
        clamp_value=clamp_value,
        clamp_scope=clamp_scope,
        clamp_unit=clamp_unit,
        residual_norm=collect(splits["retain_calibration"]).mean_residual_norm(),
    )
    densities = {
        name: text_densities(guard, model, tokenizer, texts, max_length, batch_size)
        for name, texts in splits.items()
        if name in ("retain_calibration", "retain_heldout", "forget_heldout")
    }
    threshold = calibrate_threshold(densities["retain_calibration"], threshold_percentile)
    facts = {
        "model": unwrap(model).config.name_or_path or type(unwrap(model)).__name__,
        "versions": {name: _version(name) for name in _LIBRARIES},
        "num_texts": {name: len(texts) for name, texts in splits.items()},
        "sha256_of_texts": {name: texts_digest(texts) for name, texts in splits.items()},
        "selection": {
            **asdict(selection),
            "rule": "fisher_ratio",
            "num_features": num_features,
            "ratio_percentile": ratio_percentile,
            "importance": importance,
        },
        "threshold_percentile": threshold_percentile,
        "false_positive_rate": asdict(false_positive_rate(densities["retain_heldout"], threshold)),
        "mean_residual_norm": guard.residual_norm,
        "max_length": max_length,
    }
    if splits["forget_heldout"]:
        triggered = false_positive_rate(densities["forget_heldout"], threshold)
        facts["forget_trigger_rate"] = asdict(triggered)
    return guard.replace(threshold=threshold, facts=facts)


def split_by_hash(texts: Iterable[str], fractions: Sequence[float]) -> list[list[str]]:
    """Splits texts by their SHA-256, so that a text's split never depends on the other texts.

    Case and spacing do not enter the hash: a reformatted passage stays in its split.

    Args:
        texts: Texts in any order; equal texts share a split.
        fractions: Expected share of each split, at least 0, summing to 1.

    Returns:
        The texts of each split, in the given order; sizes follow the fractions only on average.

    Raises:
        UserError: If the fractions are negative or do not sum to 1.
    """
    if min(fractions, default=-1.0) < 0 or abs(sum(fractions) - 1.0) > 1e-9:
        raise UserError(f"`fractions` must be at least 0 and sum to 1, got {list(fractions)}.")
    bounds = list(itertools.accumulate(fractions))[:-1]
    splits: list[list[str]] = [[] for _ in fractions]
    for text in texts:
        place = int.from_bytes(_sha256(_normalised(text)).digest()[:8], "big") / 2**64
        splits[sum(place >= bound for bound in bounds)].append(text)
    return splits


def text_densities(
    guard: Guard,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    max_length: int | None,
    batch_size: int,
) -> Float[Tensor, " n"]:
    """Density of each text in the unedited model, shortest text first, on the CPU.

    Args:
        guard: Whose features are counted.
        model: The language model, possibly wrapped.
        tokenizer: Its tokenizer.
        texts: One sequence each.
        max_length: Longest sequence, in tokens.
        batch_size: Sequences per forward pass.
    """
    batches = corpus_batches(tokenizer, texts, max_length, batch_size)
    densities = [
        guard.density(model, **batch.model_inputs(), token_mask=batch.token_mask).cpu()
        for batch in batches
    ]
    return torch.cat(densities) if densities else torch.zeros(0, dtype=torch.float64)


def texts_digest(texts: Iterable[str]) -> str:
    """SHA-256 over the SHA-256 of each text, whatever their order."""
    return _sha256("".join(sorted(_sha256(text).hexdigest() for text in texts))).hexdigest()


def _split(
    forget_texts: Iterable[str],
    retain_texts: Iterable[str],
    calibration_texts: Iterable[str] | None,
    heldout_texts: Iterable[str] | None,
) -> dict[str, list[str]]:
    forget_selection, forget_heldout = split_by_hash(forget_texts, FORGET_FRACTIONS)
    retain_selection, calibration, heldout = split_by_hash(retain_texts, RETAIN_FRACTIONS)
    if calibration_texts is not None:
        retain_selection, calibration = retain_selection + calibration, list(calibration_texts)
    if heldout_texts is not None:
        retain_selection, heldout = retain_selection + heldout, list(heldout_texts)
    splits = {
        "forget_selection": forget_selection,
        "forget_heldout": forget_heldout,
        "retain_selection": retain_selection,
        "retain_calibration": calibration,
        "retain_heldout": heldout,
    }
    for name, texts in splits.items():
        if not texts and name != "forget_heldout":
            raise UserError(
                f"the split {name!r} must hold at least one text, got none; pass more "
                f"{name.split('_')[0]} texts."
            )
    _check_disjoint(splits)
    return splits


def _check_disjoint(splits: dict[str, list[str]]) -> None:
    seen: dict[str, str] = {}
    for name, texts in splits.items():
        # Within a split, repetitions are the user's weighting.
        for text in dict.fromkeys(map(_normalised, texts)):
            if text in seen:
                raise UserError(
                    f"splits must not share a text, got {text[:60]!r} in {seen[text]!r} and "
                    f"{name!r}; remove it from one of the lists."
                )
            seen[text] = name


def _normalised(text: str) -> str:
    return " ".join(text.split()).casefold()


def _sha256(text: str) -> Any:
    return hashlib.sha256(text.encode())


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
