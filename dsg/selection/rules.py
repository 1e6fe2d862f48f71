"""Choosing the features that carry what is to be forgotten."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsg.errors import UserError
from dsg.sae import check_feature_ids
from dsg.selection.statistics import FeatureStatistics, Importance

# Keeps the ratio finite for features that never fire on retain text (released code's constant).
_EPSILON = 1e-21
_FORGET_SCORE_PERCENTILE = 5.0


@dataclass(frozen=True)
class Selection:
    """Selected features, most important first.

    Attributes:
        feature_ids: Ids in the SAE.
        forget_scores: Score of each on forget text; 0 where there was none.
        ratios: Forget score over retain score of each; empty where no retain text was looked at.
    """

    feature_ids: tuple[int, ...]
    forget_scores: tuple[float, ...]
    ratios: tuple[float, ...]


def select_fisher_ratio(
    forget: FeatureStatistics,
    retain: FeatureStatistics,
    num_features: int = 20,
    ratio_percentile: float = 95.0,
    importance: Importance = "mean_square",
) -> Selection:
    """The paper's rule: features far more important on forget than on retain text.

    Keeps features whose score ratio reaches its `ratio_percentile`-th percentile and whose forget
    score reaches its 5th percentile, both over all features of the SAE, and takes the
    `num_features` with the highest forget score. A feature that never fires on forget text is
    never selected, even where so few fire that the percentiles are 0.

    Args:
        forget: Statistics of forget text.
        retain: Statistics of retain text.
        num_features: How many to take (n_feats).
        ratio_percentile: Percentile of the ratio to reach, in [0, 100] (p_ratio).
        importance: Which score.

    Returns:
        At most `num_features` features; ties break on the lower id.

    Raises:
        UserError: If no feature is left, or an argument is out of range.
    """
    _check_arguments(forget, retain, num_features)
    if not 0.0 <= ratio_percentile <= 100.0:
        raise UserError(
            f"`ratio_percentile` must be in [0, 100], got {ratio_percentile}; the paper uses 95."
        )
    scores, ratios = _scores(forget, retain, importance)
    kept = (
        (ratios >= np.percentile(ratios, ratio_percentile))
        & (scores >= np.percentile(scores, _FORGET_SCORE_PERCENTILE))
        & (scores > 0)
    )
    return _take(kept, scores, scores, ratios, num_features)


def select_frequency(
    forget: FeatureStatistics,
    retain: FeatureStatistics,
    num_features: int,
    max_retain_frequency: float,
) -> Selection:
    """Rule of Farrell et al.: rare on retain text, frequent on forget text.

    Drops features that fire on more than `max_retain_frequency` of the retain tokens and takes
    the `num_features` that fire most often on forget text.

    Args:
        forget: Statistics of forget text.
        retain: Statistics of retain text.
        num_features: How many to take.
        max_retain_frequency: Largest allowed fraction of retain tokens, in [0, 1].

    Returns:
        At most `num_features` features with their mean-square scores; ties break on the lower id.

    Raises:
        UserError: If no feature is left, or an argument is out of range.
    """
    _check_arguments(forget, retain, num_features)
    if not 0.0 <= max_retain_frequency <= 1.0:
        raise UserError(
            f"`max_retain_frequency` must be in [0, 1], got {max_retain_frequency}; "
            "it is a fraction of tokens."
        )
    frequency = forget.frequency().numpy()
    kept = (retain.frequency().numpy() <= max_retain_frequency) & (frequency > 0)
    scores, ratios = _scores(forget, retain, "mean_square")
    return _take(kept, frequency, scores, ratios, num_features)


def select_ids(
    forget: FeatureStatistics, retain: FeatureStatistics, feature_ids: Sequence[int]
) -> Selection:
    """Takes features that somebody has chosen, such as by reading their descriptions.

    Args:
        forget: Statistics of forget text, which there need not be.
        retain: Statistics of retain text.
        feature_ids: Ids in the SAE, most important first.

    Raises:
        UserError: If ids repeat or are out of range.
    """
    _check_arguments(forget, retain, len(feature_ids))
    check_feature_ids(feature_ids, forget.d_sae)
    if forget.num_tokens == 0:
        return Selection(tuple(feature_ids), (0.0,) * len(feature_ids), ())
    scores, ratios = _scores(forget, retain, "mean_square")
    ids = list(feature_ids)
    return Selection(tuple(ids), tuple(scores[ids].tolist()), tuple(ratios[ids].tolist()))


def select_random(forget: FeatureStatistics, matched_to: Selection, seed: int) -> Selection:
    """Control: random features that fire about as often on forget text as the selected ones.

    Candidates are a random half of all features that fire on forget text and are not selected
    (at least as many as are wanted). For each selected feature in its order, the free candidate
    with the nearest forget frequency is taken; ties break on the lower id.

    Args:
        forget: Statistics of forget text.
        matched_to: The selection to match, none of whose features is taken.
        seed: Decides which half.

    Returns:
        As many features as `matched_to` has, without ratios.

    Raises:
        UserError: If too few other features fire on forget text.
    """
    frequency = forget.frequency().numpy()
    others = np.setdiff1d(np.flatnonzero(frequency > 0), np.array(matched_to.feature_ids))
    wanted = len(matched_to.feature_ids)
    if len(others) < wanted:
        raise UserError(
            f"a random control needs {wanted} other features that fire on forget text, got "
            f"{len(others)}; select fewer features or collect more forget text."
        )
    half = max(wanted, -(-len(others) // 2))
    free = np.sort(np.random.default_rng(seed).choice(others, half, replace=False))
    taken: list[int] = []
    for feature_id in matched_to.feature_ids:
        # argmin returns the first minimum, and `free` ascends: the lower id.
        nearest = int(np.abs(frequency[free] - frequency[feature_id]).argmin())
        taken.append(int(free[nearest]))
        free = np.delete(free, nearest)
    scores = forget.score().numpy()
    return Selection(tuple(taken), tuple(scores[taken].tolist()), ())


def _scores(
    forget: FeatureStatistics, retain: FeatureStatistics, importance: Importance
) -> tuple[np.ndarray, np.ndarray]:
    scores = forget.score(importance).numpy()
    return scores, scores / (retain.score(importance).numpy() + _EPSILON)


def _take(
    kept: np.ndarray, key: np.ndarray, scores: np.ndarray, ratios: np.ndarray, num_features: int
) -> Selection:
    ids = np.flatnonzero(kept)
    # A stable sort of ascending ids: equal keys stay in order of id.
    ids = ids[np.argsort(-key[ids], kind="stable")][:num_features]
    if len(ids) == 0:
        raise UserError(
            "the selection must leave at least one feature, got none; lower `ratio_percentile`, "
            "raise `max_retain_frequency`, or check that the forget text activates the SAE."
        )
    return Selection(tuple(ids.tolist()), tuple(scores[ids].tolist()), tuple(ratios[ids].tolist()))


def _check_arguments(
    forget: FeatureStatistics, retain: FeatureStatistics, num_features: int
) -> None:
    if forget.d_sae != retain.d_sae:
        raise UserError(
            "forget and retain statistics must be of the same SAE, got "
            f"{forget.d_sae} and {retain.d_sae} features; collect both with one SAE."
        )
    if num_features < 1:
        raise UserError(f"`num_features` must be at least 1, got {num_features}; raise it.")
