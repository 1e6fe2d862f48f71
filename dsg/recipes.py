"""DSG and its controls as settings of one guard: another selection, gate or edit, no other code."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsg.build import text_densities
from dsg.calibration import calibrate_threshold, false_positive_rate
from dsg.guard import Guard
from dsg.sae import slice_features
from dsg.selection import Selection, select_fisher_ratio, select_frequency, select_random
from dsg.statistics import FeatureStatistics, collect_statistics, corpus_batches
from dsg.tokens import uncounted_token_ids

if TYPE_CHECKING:
    from sae_lens import SAE

Method = Literal["dsg", "dsg_near", "static_clamp", "farrell", "random"]

UNGATED = ("static_clamp", "farrell")


@dataclass(frozen=True)
class GuardSettings:
    """Which guard to make and from what."""

    hook_point: str
    """Where the SAE reads and the guard edits, such as `blocks.2.hook_resid_post`."""
    sae: str
    """Folder of an SAE, or a release of SAELens's list together with `sae_id`."""
    sae_id: str | None = None
    """Id within the release."""
    method: Method = "dsg"
    """`dsg`; `dsg_near`: calibrated with the near domain and other hazards as well;
    `static_clamp`: DSG's features without the gate; `farrell`: selection by firing frequency, no
    gate, only active features clamped; `random`: features matched in forget frequency."""
    num_features: int = 20
    """Features to select."""
    ratio_percentile: float = 95.0
    """Percentile of the forget/retain score ratio that a feature must reach."""
    threshold_percentile: float = 95.0
    """Percentile of the retain densities that becomes the threshold."""
    clamp_value: float = -500.0
    """Value written to the features, in units of `clamp_unit`."""
    clamp_scope: Literal["all", "active"] = "all"
    """Clamp all selected features of a token where any is active, or only the active ones."""
    clamp_unit: Literal["activation", "residual_norm"] = "activation"
    """Unit of `clamp_value`: activations, or multiples of the mean residual norm."""
    importance: Literal["mean_square", "squared_mean"] = "mean_square"
    """The paper's score, or that of its released code."""
    max_retain_frequency: float = 0.01
    """Method `farrell`: features that fire on a larger share of retain tokens are dropped."""
    draw: int = 0
    """Method `random`: seed of the draw."""
    max_length: int = 1024
    """Tokens of a text that are read."""
    batch_size: int = 32
    """Texts per forward pass."""
    artifact: str | None = None
    """Folder of a saved guard, which is then used as it is."""


class GuardMaker:
    """Makes guards for one model and SAE; retain statistics are collected once for all of them.

    What `dsg.build_guard` does in one go, for another rule of selection, without a gate, or from
    statistics that were summed up elsewhere.

    Args:
        settings: Which guard to make.
        model: The unguarded causal LM.
        tokenizer: Its tokenizer.
        sae: The SAE that `settings` name.
        retain_texts: Retain texts for the selection of features.
        calibration_texts: Retain texts that set the threshold.
        heldout_texts: Retain texts on which the false-positive rate is measured.
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
    ) -> None:
        self.settings = settings
        self.model = model
        self.tokenizer = tokenizer
        self.sae = sae
        self.calibration_texts = calibration_texts
        self.heldout_texts = heldout_texts
        self.retain = self.statistics(retain_texts)
        self.calibration = self.statistics(calibration_texts)

    def statistics(self, texts: Sequence[str]) -> FeatureStatistics:
        """Statistics of texts at the hook point."""
        settings = self.settings
        batches = corpus_batches(self.tokenizer, texts, settings.max_length, settings.batch_size)
        return collect_statistics(self.model, self.sae, settings.hook_point, batches)

    def select(self, forget: FeatureStatistics) -> Selection:
        """Choose features by the rule of the method."""
        settings = self.settings
        if settings.method == "farrell":
            return select_frequency(
                forget, self.retain, settings.num_features, settings.max_retain_frequency
            )
        selection = select_fisher_ratio(
            forget,
            self.retain,
            settings.num_features,
            settings.ratio_percentile,
            settings.importance,
        )
        if settings.method == "random":
            return select_random(forget, selection, settings.draw)
        return selection

    def make(self, forget: FeatureStatistics) -> Guard:
        """Make the guard for the forget text behind these statistics, on the CPU."""
        settings = self.settings
        selection = self.select(forget)
        pad_id = self.tokenizer.pad_token_id
        guard = Guard(
            slice_features(self.sae, selection.feature_ids).on(torch.device("cpu")),
            hook_point=settings.hook_point,
            uncounted_ids=uncounted_token_ids(self.tokenizer),
            pad_id=pad_id if isinstance(pad_id, int) else None,
            threshold=1.0,
            clamp_value=settings.clamp_value,
            clamp_scope="active" if settings.method == "farrell" else settings.clamp_scope,
            clamp_unit=settings.clamp_unit,
            residual_norm=self.calibration.mean_residual_norm(),
            gate="token" if settings.method in UNGATED else "density",
        )
        threshold = calibrate_threshold(
            self._densities(guard, self.calibration_texts), settings.threshold_percentile
        )
        rate = false_positive_rate(self._densities(guard, self.heldout_texts), threshold)
        return guard.replace(
            threshold=threshold,
            facts={
                "settings": asdict(settings),
                "selection": asdict(selection),
                "num_calibration_sequences": len(self.calibration_texts),
                "false_positive_rate": asdict(rate),
            },
        )

    def _densities(self, guard: Guard, texts: Sequence[str]) -> Float[Tensor, " n"]:
        settings = self.settings
        return text_densities(
            guard, self.model, self.tokenizer, texts, settings.max_length, settings.batch_size
        )
