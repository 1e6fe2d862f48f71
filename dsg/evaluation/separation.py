"""How well a density tells forget text from retain text, beside the AUROC."""

from collections.abc import Sequence

import numpy as np

from dsg.errors import UserError
from dsg.evaluation.metrics import Estimate
from dsg.selection import wilson

NUM_BINS = 20


def tpr_at_fpr(
    positive: Sequence[float],
    negative: Sequence[float],
    max_fpr: float = 0.05,
    *,
    sizes: tuple[int, int] | None = None,
) -> Estimate:
    """Share of positives above the lowest threshold that few enough negatives exceed.

    As the gate does, a score counts only if it lies strictly above the threshold, which is one of
    the negative scores (or infinitely low, if every negative may be exceeded).

    Args:
        positive: Scores of the group that should be high; none may be NaN.
        negative: Scores of the other group.
        max_fpr: Largest share of negatives above the threshold, in [0, 1].
        sizes: Independent scores in each group, where some depend on each other; None takes all.

    Returns:
        The share; `n` counts the independent positives. The Wilson interval takes the threshold as
        given, so it leaves out the chance in the negatives.

    Raises:
        UserError: A group is empty or holds a NaN, or `max_fpr` is out of range.
    """
    high_group, low_group = _checked("positive", positive), _checked("negative", negative)
    if not 0 <= max_fpr <= 1:
        raise UserError(f"`max_fpr` must be in [0, 1], got {max_fpr}; the paper's gate has 0.05.")
    descending = np.sort(low_group)[::-1]
    # A share such as 0.3 of 10 must allow 3 in spite of rounding.
    allowed = int(np.floor(max_fpr * low_group.size + 1e-9))
    threshold = descending[allowed] if allowed < low_group.size else -np.inf
    n = high_group.size if sizes is None else sizes[0]
    found = wilson(float((high_group > threshold).mean()) * n, n)
    return Estimate(found.value, found.n, found.low, found.high)


def total_variation(
    first: Sequence[float],
    second: Sequence[float],
    num_bins: int = NUM_BINS,
    *,
    sizes: tuple[int, int] | None = None,
) -> Estimate:
    """Total variation distance of two samples' histograms, half the summed difference, in [0, 1].

    Both histograms have the same bins, equally wide between the smallest and the largest score of
    either sample; the last bin holds its upper end. The distance of small samples is too large: two
    samples of one distribution are not at 0. No interval is given, because that error is no matter
    of spread.

    Args:
        first: Scores; none may be NaN or infinite.
        second: Scores of the other group.
        num_bins: At least 1.
        sizes: Independent scores in each group, where some depend on each other; None takes all.

    Returns:
        The distance; `n` counts the independent scores of both groups.

    Raises:
        UserError: A group is empty or holds a value that is not finite, or there is no bin.
    """
    one, other = _checked("first", first), _checked("second", second)
    if num_bins < 1:
        raise UserError(f"`num_bins` must be at least 1, got {num_bins}; raise it.")
    both = np.concatenate([one, other])
    if np.isinf(both).any():
        raise UserError("`first` and `second` must be finite, got an infinite score; leave it out.")
    bins = np.histogram_bin_edges(both, bins=num_bins)
    shares = [np.histogram(group, bins=bins)[0] / group.size for group in (one, other)]
    distance = float(np.abs(shares[0] - shares[1]).sum()) / 2
    n = both.size if sizes is None else sum(sizes)
    return Estimate(min(1.0, distance), n, None, None)


def _checked(name: str, scores: Sequence[float]) -> np.ndarray:
    group = np.asarray(scores, np.float64)
    if group.size == 0 or np.isnan(group).any():
        raise UserError(
            f"`{name}` must hold at least one score and no NaN, got {group.size} scores "
            f"({int(np.isnan(group).sum())} NaN); check that the domain was evaluated."
        )
    return group
