"""From statistics to a calibrated guard: the steps that every way of making one shares."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsg.errors import UserError
from dsg.guard.guard import Guard
from dsg.guard.recipes import GuardSettings, choose_features, refusal_feature
from dsg.io import with_bar
from dsg.lm import (
    ModelIdentity,
    check_sae_place,
    check_width,
    resolve_hook_point,
    uncounted_token_ids,
)
from dsg.sae import check_supported, describe_sae, slice_features
from dsg.selection import (
    FeatureStatistics,
    Selection,
    calibrate_threshold,
    collect_statistics,
    corpus_batches,
    describe_texts,
    false_positive_rate,
)

if TYPE_CHECKING:
    from sae_lens import SAE

_LIBRARIES = ("dynamic-sae-guardrails", "torch", "transformers", "sae-lens")
# A sum must leak on text that never fires, and rise on text that always does.
_LEAK_RANGE = (0.01, 0.99)

# The gate's statistic of each text of a part, such as `retain_heldout`, under a guard.
Measure = Callable[[Guard, str], Float[Tensor, " n"]]


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
        settings: Which guard to make.
        model: The unguarded causal LM.
        tokenizer: Its tokenizer.
        sae: The SAE that `settings` name.
        selection: The features.
        retain: Statistics of retain text.
        residual_norm: Mean norm of the residual stream on calibration text.
    """
    parts = settings.parts()
    ids = list(selection.feature_ids)
    if parts.edit == "refusal":
        ids.append(refusal_feature(settings, retain, ids))
    pad_id = tokenizer.pad_token_id
    return Guard(
        slice_features(sae, ids).on(torch.device("cpu")),
        hook_point=settings.hook_point,
        uncounted_ids=uncounted_token_ids(tokenizer),
        pad_id=pad_id if isinstance(pad_id, int) else None,
        threshold=1.0,
        clamp_value=settings.clamp_value,
        clamp_scope=parts.clamp_scope,
        clamp_unit=settings.clamp_unit,
        residual_norm=residual_norm,
        # The leak of a running sum comes from densities.
        gate="density" if parts.gate == "cusum" else parts.gate,
        window_size=settings.window_size if parts.gate == "window" else None,
        edit=parts.edit,
        trigger_limit=settings.trigger_limit,
        model=ModelIdentity.of(model),
        facts={"settings": asdict(settings), "selection": asdict(selection)},
    )


def calibrate_guard(guard: Guard, settings: GuardSettings, measure: Measure) -> Guard:
    """Sets the threshold, and for the gate `cusum` the leak, and notes how the gate errs.

    The gate `token` has no threshold, and nothing is measured for it.

    The leak is the threshold that the density would have: the sum rises where text fires more often
    than the retain texts that the gate lets pass.

    Args:
        guard: What `draft_guard` returned.
        settings: Which guard to make.
        measure: Gives the statistics of the parts `retain_calibration`, `retain_heldout` and
            `forget_heldout`; an empty tensor where a part has no text.

    Raises:
        UserError: There is no calibration text, the percentile is out of range, or a threshold
            chosen by hand is, or its gate measures one.
    """
    facts: dict[str, Any] = {
        "mean_residual_norm": guard.residual_norm,
        "versions": {name: _version(name) for name in _LIBRARIES},
    }
    if guard.gate == "token":  # nothing to calibrate: every sequence is edited
        return guard.replace(facts={**guard.facts, **facts})
    if settings.threshold is None:
        guard, facts["calibration"] = _calibrated(guard, settings, measure)
        threshold = guard.threshold
    else:
        threshold = _given_threshold(settings)
        guard = guard.replace(threshold=threshold)
    rate = false_positive_rate(measure(guard, "retain_heldout"), threshold)
    facts["false_positive_rate"] = asdict(rate) if rate.n else None
    forget = measure(guard, "forget_heldout")
    if forget.numel():
        facts["forget_trigger_rate"] = asdict(false_positive_rate(forget, threshold))
    return guard.replace(facts={**guard.facts, **facts})


def _calibrated(
    guard: Guard, settings: GuardSettings, measure: Measure
) -> tuple[Guard, dict[str, Any]]:
    percentile = settings.threshold_percentile
    densities = measure(guard, "retain_calibration")
    threshold = calibrate_threshold(densities, percentile)
    if settings.parts().gate == "cusum":
        low, high = _LEAK_RANGE
        leak = min(max(threshold, low), high)
        guard = guard.replace(gate="cusum", leak=leak)
        threshold = calibrate_threshold(measure(guard, "retain_calibration"), percentile)
    facts = {"n": densities.numel(), "threshold_percentile": percentile}
    return guard.replace(threshold=threshold), facts


def _given_threshold(settings: GuardSettings) -> float:
    gate, threshold = settings.parts().gate, settings.threshold
    if gate == "cusum" or threshold is None or not 0.0 <= threshold <= 1.0:
        raise UserError(
            "`threshold` must be in [0, 1] and its gate `density` or `window`, got "
            f"{threshold} and {gate!r}; leave it out to measure it on retain text."
        )
    return threshold


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
        settings = self.settings
        batches = corpus_batches(self.tokenizer, texts, settings.max_length, settings.batch_size)
        shown = with_bar(batches, f"Features on {part}", show=self._show_progress)
        return collect_statistics(self.model, self.sae, settings.hook_point, shown)

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
        known = {
            "retain_calibration": self.calibration_texts,
            "retain_heldout": self.heldout_texts,
            **(texts or {}),
        }

        def measure(guard: Guard, part: str) -> Float[Tensor, " n"]:
            return text_statistics(
                guard,
                self.model,
                self.tokenizer,
                known.get(part, ()),
                settings.max_length,
                settings.batch_size,
                shown_as=f"Gate on {part}" if self._show_progress else None,
            )

        guard = calibrate_guard(draft, settings, measure)
        described = {name: describe_texts(part) for name, part in known.items()}
        origin = {**self._origin, "texts": {**self._origin["texts"], **described}}
        return guard.replace(facts={**guard.facts, **origin})


def text_statistics(
    guard: Guard,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int | None,
    batch_size: int,
    *,
    shown_as: str | None = None,
) -> Float[Tensor, " n"]:
    """The gate's statistic of each text in the unedited model, shortest text first, on the CPU.

    Args:
        guard: Whose features are counted.
        model: The language model, possibly wrapped.
        tokenizer: Its tokenizer.
        texts: One sequence each.
        max_length: Longest sequence, in tokens.
        batch_size: Sequences per forward pass.
        shown_as: Name of a bar on a terminal; None for no bar.
    """
    batches = corpus_batches(tokenizer, texts, max_length, batch_size)
    found = [
        guard.statistic(model, **batch.model_inputs(), token_mask=batch.token_mask).cpu()
        for batch in with_bar(batches, shown_as or "", show=shown_as is not None)
    ]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
