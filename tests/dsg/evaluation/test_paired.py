import itertools
from math import comb

import numpy as np
import pytest

from dsg.errors import UserError
from dsg.evaluation.paired import compare_values, mcnemar, sign_flip


def outcomes(both, first_only, second_only, neither):
    counts = (
        (1.0, 1.0, both),
        (1.0, 0.0, first_only),
        (0.0, 1.0, second_only),
        (0.0, 0.0, neither),
    )
    pairs = [(a, b) for a, b, count in counts for _ in range(count)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def test_mcnemar_by_hand():
    found = mcnemar(*outcomes(10, 1, 7, 2))
    # 8 items differ; 2 * P(at most 1 of 8) = 2 * (1 + 8) / 256.
    assert found.p == pytest.approx(2 * 9 / 256)
    assert (found.first, found.second, found.n) == (11 / 20, 17 / 20, 20)
    assert found.difference == pytest.approx(0.3)
    assert mcnemar(*outcomes(10, 0, 0, 3)).p == 1.0


def test_newcombes_interval():
    """His method 10, written out from the Wilson limits of 14 and 12 in 21."""
    found = mcnemar(*outcomes(12, 0, 2, 7))
    assert found.difference == pytest.approx(2 / 21)
    phi = 73.5 / np.sqrt(14 * 7 * 12 * 9)
    l1, u1, l2, u2 = 0.45371, 0.82805, 0.36549, 0.75530
    p1, p2 = 14 / 21, 12 / 21
    low = 2 / 21 - np.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    high = 2 / 21 + np.sqrt((u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2)
    assert found.low == pytest.approx(low, abs=1e-4)
    assert found.high == pytest.approx(high, abs=1e-4)


def test_the_interval_covers_the_difference():
    """Exact coverage at n = 12, by summing over all tables."""
    n, probabilities = 12, (0.5, 0.05, 0.25, 0.2)
    covered = 0.0
    for both, first_only, second_only in itertools.product(range(n + 1), repeat=3):
        neither = n - both - first_only - second_only
        if neither < 0:
            continue
        counts = (both, first_only, second_only, neither)
        ways, rest = 1, n
        for count in counts:
            ways, rest = ways * comb(rest, count), rest - count
        weight = ways * np.prod([p**count for p, count in zip(probabilities, counts, strict=True)])
        found = mcnemar(*outcomes(*counts))
        covered += weight * (found.low <= 0.20 <= found.high)
    assert 0.93 < covered < 0.99


def test_sign_flip_equals_all_patterns_by_brute_force():
    first = [0.1, 0.4, 0.2, 0.9, 0.5, 0.3]
    second = [0.3, 0.5, 0.1, 1.0, 0.9, 0.3]
    gaps = [b - a for a, b in zip(first, second, strict=True)]
    observed = abs(sum(gaps))
    larger = sum(
        abs(sum(s * g for s, g in zip(signs, gaps, strict=True))) >= observed - 1e-9
        for signs in itertools.product((-1, 1), repeat=6)
    )
    found = sign_flip(first, second)
    assert found.p == pytest.approx(larger / 64)
    assert found.difference == pytest.approx(sum(gaps) / 6)
    assert found.low < found.difference < found.high


def test_sign_flip_on_binary_values_is_mcnemar():
    first, second = outcomes(3, 1, 6, 1)
    assert sign_flip(first, second).p == pytest.approx(mcnemar(first, second).p)


def test_random_signs_agree_with_scipy():
    from scipy.stats import permutation_test

    rng = np.random.default_rng(3)
    first = rng.normal(size=40)
    second = first + rng.normal(0.25, 0.8, size=40)
    found = sign_flip(first.tolist(), second.tolist())
    reference = permutation_test(
        (second, first),
        lambda b, a, axis: (b - a).mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=4,
    )
    assert found.p == pytest.approx(reference.pvalue, abs=0.01)
    gaps = second - first
    # The bootstrap of a mean of 40 is close to the normal interval.
    half = 1.96 * gaps.std() / np.sqrt(40)
    assert found.low == pytest.approx(gaps.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(gaps.mean() + half, abs=0.1 * half)
    assert found == sign_flip(first.tolist(), second.tolist())


def test_equal_runs_do_not_differ():
    values = [0.2, 0.7, 0.7] * 10
    found = sign_flip(values, values)
    assert (found.p, found.difference, found.low, found.high) == (1.0, 0.0, 0.0, 0.0)


def test_the_values_choose_the_test():
    assert compare_values([0.0, 1.0], [1.0, 1.0]).test == "mcnemar"
    assert compare_values([0.0, 0.5], [1.0, 1.0]).test == "sign_flip"


def test_many_items_take_several_blocks(monkeypatch):
    rng = np.random.default_rng(5)
    first, second = rng.normal(size=(2, 30)).tolist()
    whole = sign_flip(first, second)
    monkeypatch.setattr("dsg.evaluation.paired._CELLS", 30 * 7)
    blocks = sign_flip(first, second)
    assert blocks.p == pytest.approx(whole.p, abs=0.02)
    assert blocks.low == pytest.approx(whole.low, abs=0.05)


def test_one_item_has_no_interval():
    found = sign_flip([0.5], [0.75])
    assert (found.difference, found.low, found.high, found.p) == (0.25, None, None, 1.0)


@pytest.mark.parametrize(
    ("first", "second"), [([], []), ([1.0], [1.0, 0.0]), ([1.0], [float("nan")])]
)
@pytest.mark.parametrize("test", [mcnemar, sign_flip])
def test_bad_pairs(test, first, second):
    with pytest.raises(UserError, match="one number per item and no NaN"):
        test(first, second)


def test_mcnemar_needs_binary_values():
    with pytest.raises(UserError, match="use sign_flip"):
        mcnemar([0.5], [1.0])
