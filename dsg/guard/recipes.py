"""DSG and its relatives as settings of one guard: other parts, no other code path."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dsg.errors import UserError, check_choice, check_each_once
from dsg.guard.edit import Clamp, ClampScope, ClampUnit, Edit, EditKind, Refusal
from dsg.guard.gate import CusumGate, DensityGate, Gate, GateKind, OpenGate, WindowGate
from dsg.selection import (
    FeatureStatistics,
    Importance,
    Selection,
    select_fisher_ratio,
    select_frequency,
    select_ids,
    select_random,
)

Method = Literal[
    "dsg",
    "dsg_near",
    "dsg_window",
    "dsg_cusum",
    "static_clamp",
    "farrell",
    "clamp_prime",
    "refusal_clamp",
    "random",
]
_LARGEST = sys.float_info.max
SelectionRule = Literal["fisher_ratio", "frequency", "ids", "random"]


@dataclass(frozen=True)
class Parts:
    """What a method is made of.

    Attributes:
        selection: Which features.
        gate: Which sequences.
        edit: What is written.
        clamp_scope: Where it is written.
    """

    selection: SelectionRule
    gate: GateKind
    edit: EditKind
    clamp_scope: ClampScope


RECIPES: dict[Method, Parts] = {
    "dsg": Parts("fisher_ratio", "density", "clamp", "all"),
    "dsg_near": Parts("fisher_ratio", "density", "clamp", "all"),
    "dsg_window": Parts("fisher_ratio", "window", "clamp", "all"),
    "dsg_cusum": Parts("fisher_ratio", "cusum", "clamp", "all"),
    "static_clamp": Parts("fisher_ratio", "token", "clamp", "all"),
    "farrell": Parts("frequency", "token", "clamp", "active"),
    "clamp_prime": Parts("frequency", "token", "clamp", "active"),
    "refusal_clamp": Parts("frequency", "token", "refusal", "active"),
    "random": Parts("random", "density", "clamp", "all"),
}


@dataclass(frozen=True)
class GuardSettings:
    """Which guard to make and from what.

    Raises:
        UserError: A value is out of range, or contradicts another one.
    """

    hook_point: str
    """Where the SAE reads and the guard edits, such as `blocks.2.hook_resid_post`."""
    sae: str
    """Folder of an SAE, or a release of SAELens's list together with `sae_id`."""
    sae_id: str | None = None
    """Id within the release."""
    method: Method = "dsg"
    """`dsg`; `dsg_near`: calibrated with the near domain and other hazards as well; `dsg_window`,
    `dsg_cusum`: with a gate that text around a passage cannot dilute; `static_clamp`: DSG's
    selection without a gate; `farrell`: selection by firing frequency, no gate, only active
    features clamped; `clamp_prime`: the same parts, in its paper with fewer features and a larger
    value; `refusal_clamp`: writes another feature instead; `random`: features matched in forget
    frequency."""
    selection: SelectionRule | None = None
    """Which features: `fisher_ratio`, `frequency`, `ids` or `random`. None takes the method's."""
    gate: GateKind | None = None
    """Which sequences: `density`, `window`, `cusum` or `token` (all). None takes the method's."""
    edit: EditKind | None = None
    """`clamp` the selected features, or write another one (`refusal`). None takes the method's."""
    num_features: int = 20
    """Features to select."""
    ratio_percentile: float = 95.0
    """Percentile of the forget/retain score ratio that a feature must reach."""
    threshold_percentile: float = 95.0
    """Percentile of the gate's statistic on retain texts that becomes the threshold."""
    threshold: float | None = None
    """A threshold chosen by hand, for the gates `density` and `window`, in [0, 1]. None takes the
    percentile."""
    clamp_value: float = -500.0
    """Value written to the features, in units of `clamp_unit`."""
    clamp_scope: ClampScope | None = None
    """Clamp all selected features of a token where any is active, or only the active ones. None
    takes the method's."""
    clamp_unit: ClampUnit = "activation"
    """Unit of `clamp_value`: activations, or multiples of the mean residual norm."""
    trigger_limit: float = 0.0
    """Activation above which the edit takes a feature as active."""
    importance: Importance = "mean_square"
    """The paper's score, or that of its released code."""
    max_retain_frequency: float = 0.01
    """Selection `frequency`: features that fire on a larger share of retain tokens are dropped."""
    feature_ids: list[int] | None = None
    """Selection `ids`: the features, most important first."""
    refusal_id: int | None = None
    """Edit `refusal`: the feature to write. None takes the one with the highest mean square on
    retain text of those that are not selected."""
    window_size: int = 32
    """Gate `window`: counted tokens of a window."""
    draw: int = 0
    """Selection `random`: seed of the draw."""
    max_length: int | None = 1024
    """Tokens of a text that are read."""
    batch_size: int = 32
    """Texts per forward pass."""
    artifact: str | None = None
    """Folder of a saved guard, which is then used as it is."""

    def __post_init__(self) -> None:
        self.parts()
        _check_ranges(self)
        _check_use(self)

    def parts(self) -> Parts:
        """The method's parts, but for those that are given.

        Raises:
            UserError: The method is unknown.
        """
        check_choice("method", self.method, tuple(RECIPES))
        recipe = RECIPES[self.method]
        return Parts(
            self.selection or recipe.selection,
            self.gate or recipe.gate,
            self.edit or recipe.edit,
            self.clamp_scope or recipe.clamp_scope,
        )

    def make_gate(self) -> Gate:
        """The gate before its calibration, or with the threshold that was chosen by hand."""
        threshold = 1.0 if self.threshold is None else self.threshold
        gates: dict[GateKind, Gate] = {
            "density": DensityGate(threshold),
            "window": WindowGate(threshold, self.window_size),
            "cusum": CusumGate(threshold, leak=0.5),
            "token": OpenGate(),
        }
        return gates[self.parts().gate]

    def make_edit(self, residual_norm: float) -> Edit:
        """The edit, given the mean norm of the residual stream at the hook point."""
        parts = self.parts()
        unit: dict[str, Any] = {"unit": self.clamp_unit, "residual_norm": residual_norm}
        if parts.edit == "refusal":
            return Refusal(self.clamp_value, **unit, trigger_limit=self.trigger_limit)
        scope = parts.clamp_scope
        return Clamp(self.clamp_value, scope, **unit, trigger_limit=self.trigger_limit)


def _check_use(settings: GuardSettings) -> None:
    """Refuses settings that the method's parts would ignore, or lack."""
    parts = settings.parts()
    for name, owner, used in (
        ("feature_ids", "selection 'ids'", parts.selection == "ids"),
        ("refusal_id", "edit 'refusal'", parts.edit == "refusal"),
    ):
        value = vars(settings)[name]
        if value is not None and not used:
            raise UserError(
                f"`{name}` must be left out but for the {owner}, got {value}; remove it, or set "
                "the other."
            )
    if parts.selection == "ids" and settings.artifact is None:
        if settings.feature_ids is None:
            raise UserError("`feature_ids` must be given for the selection 'ids', got None.")
        check_each_once("feature_ids", settings.feature_ids)
    threshold = settings.threshold
    measured = parts.gate not in ("density", "window")
    if threshold is not None and (measured or not 0.0 <= threshold <= 1.0):
        raise UserError(
            "`threshold` must be in [0, 1] and its gate `density` or `window`, got "
            f"{threshold} and {parts.gate!r}; leave it out to measure it on retain text."
        )


def _check_ranges(settings: GuardSettings) -> None:
    inf = float("inf")
    ranges = {
        "at least 1": (1, inf, "num_features window_size max_length batch_size"),
        "at least 0": (0, inf, "draw refusal_id"),
        "in [0, 100]": (0, 100, "ratio_percentile threshold_percentile"),
        "in [0, 1]": (0, 1, "max_retain_frequency"),
        "a finite number": (-_LARGEST, _LARGEST, "clamp_value"),
        "finite and at least 0": (0, _LARGEST, "trigger_limit"),
    }
    for wanted, (low, high, names) in ranges.items():
        for name in names.split():
            value = vars(settings)[name]
            if value is not None and not low <= value <= high:
                raise UserError(f"`{name}` must be {wanted}, got {value}; change it.")
    if any(feature < 0 for feature in settings.feature_ids or ()):
        raise UserError(
            f"`feature_ids` must be at least 0, got {settings.feature_ids}; correct the list."
        )


def choose_features(
    settings: GuardSettings, forget: FeatureStatistics, retain: FeatureStatistics
) -> Selection:
    """Selects features by the settings' rule.

    Raises:
        UserError: No feature is left.
    """
    rule = settings.parts().selection
    if rule == "frequency":
        return select_frequency(
            forget, retain, settings.num_features, settings.max_retain_frequency
        )
    if rule == "ids":
        assert settings.feature_ids is not None
        return select_ids(forget, retain, settings.feature_ids)
    selection = select_fisher_ratio(
        forget, retain, settings.num_features, settings.ratio_percentile, settings.importance
    )
    return select_random(forget, selection, settings.draw) if rule == "random" else selection


def refusal_feature(
    settings: GuardSettings, retain: FeatureStatistics, selected: Sequence[int]
) -> int:
    """The feature that the edit `refusal` writes.

    Its paper names one feature of one SAE and gives no rule. The strongest feature of ordinary text
    is a direction that the rest of the model relies on, and needs no labels.

    Raises:
        UserError: The named feature triggers itself.
    """
    if settings.refusal_id is None:
        scores = retain.score().numpy().copy()
        scores[list(selected)] = -1.0
        return int(np.argmax(scores))
    if settings.refusal_id in selected:
        raise UserError(
            f"`refusal_id` must not be one of the selected features, got {settings.refusal_id}; "
            "choose another one."
        )
    return settings.refusal_id
