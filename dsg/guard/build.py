"""From texts to a calibrated guard, in plain Python."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from dsg.errors import UserError
from dsg.guard.edit import ClampScope, ClampUnit
from dsg.guard.guard import Guard
from dsg.guard.making import GuardBuilder
from dsg.guard.recipes import GuardSettings
from dsg.lm import unwrap
from dsg.selection import FORGET_FRACTIONS, RETAIN_FRACTIONS, Importance, check_texts, split_by_hash

if TYPE_CHECKING:
    from sae_lens import SAE

# At the 95th percentile 5 texts lie above the threshold.
_ENOUGH_TEXTS = 100
logger = logging.getLogger(__name__)


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
    show_progress: bool = True,
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
        show_progress: Show bars, on a terminal only.

    Returns:
        A guard on the CPU, whose `facts` tell how it was made. A warning is logged if few texts
        stand behind its threshold.

    Raises:
        UserError: If SAE, model and hook point do not fit, a split is empty, splits share a text,
            or an argument is out of range.
    """
    splits = _split(forget_texts, retain_texts, calibration_texts, heldout_texts)
    settings = GuardSettings(
        hook_point=hook_point,
        sae=str((sae.cfg.metadata.loaded_from or ["given"])[0]),
        num_features=num_features,
        ratio_percentile=ratio_percentile,
        threshold_percentile=threshold_percentile,
        clamp_value=clamp_value,
        clamp_scope=clamp_scope,
        clamp_unit=clamp_unit,
        importance=importance,
        max_length=max_length,
        batch_size=batch_size,
    )
    maker = GuardBuilder(
        settings,
        unwrap(model),
        tokenizer,
        sae,
        splits["retain_selection"],
        splits["retain_calibration"],
        splits["retain_heldout"],
        show_progress=show_progress,
    )
    forget = {name: splits[name] for name in ("forget_selection", "forget_heldout")}
    guard = maker.make(maker.statistics(splits["forget_selection"]), forget)
    num_texts = len(splits["retain_calibration"])
    if num_texts < _ENOUGH_TEXTS:
        logger.warning(
            "the threshold %.3g comes from %d calibration texts, of which %.1f are expected above "
            "it; give `retain_texts` or `calibration_texts` enough for %d",
            guard.threshold,
            num_texts,
            num_texts * (1 - threshold_percentile / 100),
            _ENOUGH_TEXTS,
        )
    return guard


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
    check_texts(splits)
    return splits
