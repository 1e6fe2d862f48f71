"""From texts to a calibrated guard: at once in plain Python, or step by step."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsg.errors import UserError
from dsg.guard.edit import ClampScope, ClampUnit
from dsg.guard.gate import Gate, OpenGate
from dsg.guard.guard import Guard
from dsg.guard.recipes import GuardSettings, choose_features, refusal_feature
from dsg.io import with_bar
from dsg.lm import (
    ModelIdentity,
    TokenBatch,
    check_width,
    resolve_hook_point,
    uncounted_token_ids,
    unwrap,
)
from dsg.sae import check_sae_place, check_supported, describe_sae, slice_features
from dsg.selection import (
    FORGET_FRACTIONS,
    RETAIN_FRACTIONS,
    FeatureStatistics,
    Importance,
    Selection,
    calibrate_threshold,
    check_texts,
    collect_statistics,
    corpus_batches,
    describe_texts,
    false_positive_rate,
    split_by_hash,
)

if TYPE_CHECKING:
    from sae_lens import SAE

# At the 95th percentile 5 texts lie above the threshold.
_ENOUGH_TEXTS = 100
_LIBRARIES = ("dynamic-sae-guardrails", "torch", "transformers", "sae-lens")
logger = logging.getLogger(__name__)

# A gate's statistic of each text of a part, such as `retain_heldout`.
Measure = Callable[[Gate, str], Float[Tensor, " texts"]]


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
    builder = GuardBuilder(
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
    guard = builder.make(builder.statistics(splits["forget_selection"]), forget)
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


def draft_guard(
    settings: GuardSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: "SAE[Any]",
    selection: Selection,
    retain: FeatureStatistics,
    residual_norm: float,
) -> Guard:
    """A guard with the selected features that is yet to be calibrated, on the CPU.

    Args:
        settings: Which guard to make of these parts.
        model: The unguarded causal LM.
        tokenizer: Its own.
        sae: The one that `settings` name.
        selection: Its features.
        retain: Statistics of retain text, from which an edit may choose a further feature.
        residual_norm: Mean norm of the residual stream on calibration text.
    """
    edit, ids = settings.make_edit(residual_norm), list(selection.feature_ids)
    if edit.num_further:
        ids.append(refusal_feature(settings, retain, ids))
    pad_id = tokenizer.pad_token_id
    return Guard(
        slice_features(sae, ids).on(torch.device("cpu")),
        hook_point=settings.hook_point,
        uncounted_ids=uncounted_token_ids(tokenizer),
        pad_id=pad_id if isinstance(pad_id, int) else None,
        gate=settings.make_gate(),
        edit=edit,
        model=ModelIdentity.of(model),
        facts={"settings": asdict(settings), "selection": asdict(selection)},
    )


def calibrate_guard(guard: Guard, settings: GuardSettings, measure: Measure) -> Guard:
    """Calibrates the gate, unless its threshold was chosen by hand, and notes how it errs.

    An open gate has nothing to calibrate, and nothing is measured for it.

    Args:
        guard: What `draft_guard` returned.
        settings: Which guard to make.
        measure: Knows the parts `retain_calibration`, `retain_heldout` and `forget_heldout`; an
            empty tensor where a part has no text.

    Raises:
        UserError: There is no calibration text.
    """
    facts: dict[str, Any] = {
        **guard.facts,
        "mean_residual_norm": guard.edit.residual_norm,
        "versions": {name: _version(name) for name in _LIBRARIES},
    }
    gate, percentile = guard.gate, settings.threshold_percentile
    if isinstance(gate, OpenGate):
        return guard.replace(facts=facts)
    if settings.threshold is None:
        num_texts = 0

        def threshold_of(statistics: Float[Tensor, " texts"]) -> float:
            nonlocal num_texts
            num_texts = statistics.numel()
            return calibrate_threshold(statistics, percentile)

        gate = gate.calibrated(lambda draft: measure(draft, "retain_calibration"), threshold_of)
        facts["calibration"] = {"n": num_texts, "threshold_percentile": percentile}
    rate = false_positive_rate(measure(gate, "retain_heldout"), gate.threshold)
    facts["false_positive_rate"] = asdict(rate) if rate.n else None
    forget = measure(gate, "forget_heldout")
    if forget.numel():
        facts["forget_trigger_rate"] = asdict(false_positive_rate(forget, gate.threshold))
    return guard.replace(gate=gate, facts=facts)


class GuardBuilder:
    """Makes guards for one model and SAE; retain statistics are collected once for all of them.

    Args:
        settings: Which guard to make.
        model: The unguarded causal LM.
        tokenizer: Its tokenizer.
        sae: The SAE that `settings` name.
        retain_texts: Retain texts for the selection of features.
        calibration_texts: Retain texts that set the threshold.
        heldout_texts: Retain texts on which the false-positive rate is measured.
        show_progress: Show a bar on a terminal for each pass over texts.

    Raises:
        UserError: SAE, model and hook point do not fit.
    """

    def __init__(
        self,
        settings: GuardSettings,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sae: "SAE[Any]",
        retain_texts: Sequence[str],
        calibration_texts: Sequence[str],
        heldout_texts: Sequence[str],
        *,
        show_progress: bool = False,
    ) -> None:
        check_supported(sae)
        check_width(model, sae.cfg.d_in)
        resolve_hook_point(model, settings.hook_point)
        check_sae_place(model, sae, settings.hook_point)
        self.settings = settings
        self.model = model
        self.tokenizer = tokenizer
        self.sae = sae
        self.calibration_texts = calibration_texts
        self.heldout_texts = heldout_texts
        self._show_progress = show_progress
        self.retain = self.statistics(retain_texts, "retain_selection")
        self.calibration = self.statistics(calibration_texts, "retain_calibration")
        self._origin = {
            "sae": describe_sae(sae),
            "texts": {"retain_selection": describe_texts(retain_texts)},
        }

    def statistics(self, texts: Sequence[str], part: str = "forget_selection") -> FeatureStatistics:
        """Statistics of texts at the hook point.

        Args:
            texts: One sequence each.
            part: What the bar calls them.
        """
        batches = self._batches(texts, f"Features on {part}")
        return collect_statistics(self.model, self.sae, self.settings.hook_point, batches)

    def make(
        self,
        forget: FeatureStatistics,
        texts: Mapping[str, Sequence[str]] | None = None,
    ) -> Guard:
        """Make the guard for the forget text behind these statistics, on the CPU.

        Args:
            forget: Statistics of the forget text for the selection.
            texts: Forget texts behind them (`forget_selection`) and others on which to measure how
                often the gate triggers (`forget_heldout`), where they are at hand.
        """
        settings = self.settings
        selection = choose_features(settings, forget, self.retain)
        norm = self.calibration.mean_residual_norm()
        draft = draft_guard(
            settings, self.model, self.tokenizer, self.sae, selection, self.retain, norm
        )
        parts = {
            "retain_calibration": self.calibration_texts,
            "retain_heldout": self.heldout_texts,
            **(texts or {}),
        }

        def measure(gate: Gate, part: str) -> Float[Tensor, " texts"]:
            guard = draft.replace(gate=gate)
            statistics = [
                guard.statistic(self.model, **batch.model_inputs(), token_mask=batch.token_mask)
                for batch in self._batches(parts.get(part, ()), f"Gate on {part}")
            ]
            return torch.cat([torch.zeros(0, dtype=torch.float64), *(s.cpu() for s in statistics)])

        guard = calibrate_guard(draft, settings, measure)
        described = {name: describe_texts(part) for name, part in parts.items()}
        origin = {**self._origin, "texts": {**self._origin["texts"], **described}}
        return guard.replace(facts={**guard.facts, **origin})

    def _batches(self, texts: Sequence[str], shown_as: str) -> Iterable[TokenBatch]:
        settings = self.settings
        batches = corpus_batches(self.tokenizer, texts, settings.max_length, settings.batch_size)
        return with_bar(batches, shown_as, show=self._show_progress)


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
