import numpy as np
import pytest

from dsg.errors import UserError
from dsg.evaluation.separation import total_variation, tpr_at_fpr


def brute_tpr(positive, negative, max_fpr):
    """The best share over all thresholds, tried one by one."""
    best = 0.0
    for threshold in [-np.inf, *positive, *negative]:
        exceeded = sum(score > threshold for score in negative)
        if exceeded <= max_fpr * len(negative) + 1e-9:
            best = max(best, sum(score > threshold for score in positive) / len(positive))
    return best


def test_tpr_by_hand():
    negative = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    positive = [0.9, 0.8, 0.95, 0.1]
    # No negative may lie above: the threshold is 0.9, which only 0.95 exceeds.
    assert tpr_at_fpr(positive, negative, 0.0).value == 0.25
    # One may: 0.8; now 0.9 counts too, while 0.8 is not strictly above.
    found = tpr_at_fpr(positive, negative, 0.1)
    assert (found.value, found.n) == (0.5, 4)
    # Wilson interval of 2 in 4.
    assert (found.low, found.high) == (
        pytest.approx(0.1500, abs=1e-4),
        pytest.approx(0.85, abs=1e-4),
    )
    assert tpr_at_fpr(positive, negative, 1.0).value == 1.0


@pytest.mark.parametrize("max_fpr", [0.0, 0.05, 0.07, 0.3, 0.5, 1.0])
def test_tpr_is_the_best_of_all_thresholds(max_fpr):
    rng = np.random.default_rng(0)
    for size in (1, 3, 10, 20):
        # Few distinct values, so that ties within and between the groups are common.
        positive = rng.integers(3, 9, size).tolist()
        negative = rng.integers(0, 7, size + 3).tolist()
        found = tpr_at_fpr(positive, negative, max_fpr)
        assert found.value == pytest.approx(brute_tpr(positive, negative, max_fpr))


def test_total_variation_by_hand():
    # Bins [0, 0.5) and [0.5, 1]: shares (3/4, 1/4) and (1/4, 3/4).
    first, second = [0.0, 0.1, 0.2, 0.9], [0.4, 0.5, 0.8, 1.0]
    assert total_variation(first, second, num_bins=2).value == pytest.approx(0.5)
    assert total_variation(first, second, num_bins=2).n == 8
    assert total_variation([0.0, 0.1], [0.9, 1.0]).value == pytest.approx(1.0)
    assert total_variation(first, first).value == 0.0
    assert total_variation([0.0, 0.0], [0.0]).value == 0.0  # constant scores


def test_total_variation_is_the_largest_difference_over_all_sets_of_bins():
    rng = np.random.default_rng(1)
    first, second = rng.beta(2, 5, 60), rng.beta(4, 3, 40)
    low, high = min(first.min(), second.min()), max(first.max(), second.max())
    places = [
        np.minimum((4 * (group - low) / (high - low)).astype(int), 3) for group in (first, second)
    ]
    best = 0.0
    for chosen in range(16):
        inside = [np.mean([bool(chosen >> place & 1) for place in group]) for group in places]
        best = max(best, abs(inside[0] - inside[1]))
    assert total_variation(first.tolist(), second.tolist(), num_bins=4).value == pytest.approx(best)


@pytest.mark.parametrize("measure", [tpr_at_fpr, total_variation])
def test_bad_groups(measure):
    with pytest.raises(UserError, match=r"`(positive|first)` must hold at least one"):
        measure([], [1.0])
    with pytest.raises(UserError, match=r"`(negative|second)` .* 2 scores \(1 NaN\)"):
        measure([1.0], [float("nan"), 0.0])


def test_bad_settings():
    with pytest.raises(UserError, match="max_fpr"):
        tpr_at_fpr([1.0], [0.0], 1.5)
    with pytest.raises(UserError, match="num_bins"):
        total_variation([1.0], [0.0], 0)
    with pytest.raises(UserError, match="finite"):
        total_variation([1.0], [float("inf")])
