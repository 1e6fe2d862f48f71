import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsg.errors import UserError
from dsg.selection.rules import (
    Selection,
    select_fisher_ratio,
    select_frequency,
    select_ids,
    select_random,
)
from dsg.selection.statistics import FeatureStatistics


def statistics(scores, frequencies=None, num_tokens=100):
    """Statistics with given mean squares and firing counts per 100 tokens."""
    made = FeatureStatistics(len(scores))
    made.num_tokens = num_tokens
    made.sum_of_squares = torch.tensor(scores, dtype=torch.float64) * num_tokens
    made.sum = made.sum_of_squares.sqrt()
    fired = frequencies if frequencies is not None else [int(s > 0) for s in scores]
    made.num_fired = torch.tensor(fired)
    return made


def test_hand_computed_selection():
    # Ratios 5, 4, 0.5, 2: the 50th percentile is 3, so features 0 and 1 stay; by score 1 leads.
    chosen = select_fisher_ratio(
        statistics([5.0, 8.0, 1.0, 4.0]), statistics([1.0, 2.0, 2.0, 2.0]), 2, 50.0
    )
    assert chosen.feature_ids == (1, 0)
    assert chosen.forget_scores == pytest.approx((8.0, 5.0))
    assert chosen.ratios == pytest.approx((4.0, 5.0))


def test_chosen_features_need_no_forget_text():
    some, none = statistics([5.0, 8.0, 1.0, 4.0]), FeatureStatistics(4)
    assert select_ids(none, some, [2, 0]) == Selection((2, 0), (0.0, 0.0), ())
    assert select_ids(some, some, [2, 0]).forget_scores == pytest.approx((1.0, 5.0))


def test_ties_break_on_the_lower_id():
    chosen = select_fisher_ratio(statistics([2.0] * 6), statistics([1.0] * 6), 3, 95.0)
    assert chosen.feature_ids == (0, 1, 2)


@given(st.lists(st.integers(1, 9), min_size=5, max_size=40), st.integers(0, 99), st.integers(1, 9))
def test_agrees_with_a_plain_loop(scores, seed, num_features):
    forget = [float(score) for score in scores]
    retain = np.random.default_rng(seed).integers(1, 9, len(scores)).astype(float).tolist()
    ratios = [f / (r + 1e-21) for f, r in zip(forget, retain, strict=True)]
    survivors = [
        j
        for j in range(len(forget))
        if ratios[j] >= np.percentile(ratios, 80) and forget[j] >= np.percentile(forget, 5)
    ]
    expected = sorted(survivors, key=lambda j: (-forget[j], j))[:num_features]
    made_forget, made_retain = statistics(forget, num_tokens=1), statistics(retain, num_tokens=1)
    if not expected:
        with pytest.raises(UserError, match="at least one feature, got none"):
            select_fisher_ratio(made_forget, made_retain, num_features, 80.0)
    else:
        chosen = select_fisher_ratio(made_forget, made_retain, num_features, 80.0)
        assert list(chosen.feature_ids) == expected


def test_features_silent_on_retain_have_a_finite_ratio():
    chosen = select_fisher_ratio(statistics([2.0, 1.0]), statistics([0.0, 1.0]), 1, 100.0)
    assert chosen.feature_ids == (0,)
    assert chosen.ratios == pytest.approx((2e21,))


def test_squared_mean_can_choose_otherwise():
    forget, retain = FeatureStatistics(2), statistics([1.0, 1.0])
    forget.update(torch.tensor([[3.0, 2.0], [0.0, 2.0]]), torch.ones(2, dtype=torch.bool))
    assert select_fisher_ratio(forget, retain, 1, 0.0, "mean_square").feature_ids == (0,)
    assert select_fisher_ratio(forget, retain, 1, 0.0, "squared_mean").feature_ids == (1,)


def test_fewer_than_asked_are_taken():
    chosen = select_fisher_ratio(statistics([1.0, 2.0]), statistics([1.0, 1.0]), 5, 100.0)
    assert chosen.feature_ids == (1,)


def test_features_silent_on_forget_are_never_selected():
    silent = statistics([0.0, 0.0, 0.0])
    with pytest.raises(UserError, match="at least one feature, got none"):
        select_fisher_ratio(silent, statistics([1.0, 1.0, 1.0]))
    mostly = select_fisher_ratio(statistics([0.0] * 99 + [1.0]), statistics([1.0] * 100), 5)
    assert mostly.feature_ids == (99,)


def test_frequency_rule():
    forget = statistics([1.0] * 5, frequencies=[10, 50, 30, 30, 0])
    retain = statistics([1.0] * 5, frequencies=[0, 20, 1, 1, 0])
    assert select_frequency(forget, retain, 4, 0.01).feature_ids == (2, 3, 0)
    assert select_frequency(forget, retain, 4, 1.0).feature_ids == (1, 2, 3, 0)


def test_random_control_matches_frequencies_and_avoids_the_selected():
    frequencies = [50, 10, *range(1, 61), 0]
    forget = statistics([1.0] * 63, frequencies=frequencies)
    selected = select_frequency(forget, statistics([1.0] * 63, frequencies=[0] * 63), 2, 1.0)
    draws = {select_random(forget, selected, seed).feature_ids for seed in range(8)}
    assert len(draws) > 1
    for ids in draws:
        assert not set(ids) & set(selected.feature_ids)
        assert len(set(ids)) == 2
        for mine, theirs in zip(ids, selected.feature_ids, strict=True):
            assert abs(frequencies[mine] - frequencies[theirs]) <= 20
            assert frequencies[mine] > 0
    again = select_random(forget, selected, 3)
    assert again == select_random(forget, selected, 3)
    assert again.ratios == ()


def test_random_control_needs_enough_other_features():
    forget = statistics([1.0, 1.0, 0.0])
    selected = select_frequency(forget, statistics([1.0] * 3), 2, 1.0)
    with pytest.raises(UserError, match=r"needs 2 other features .* got 0"):
        select_random(forget, selected, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_features": 0}, "`num_features` must be at least 1, got 0"),
        ({"ratio_percentile": 101.0}, r"`ratio_percentile` must be in \[0, 100\], got 101"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        select_fisher_ratio(statistics([1.0]), statistics([1.0]), **arguments)


def test_different_saes_are_refused():
    with pytest.raises(UserError, match="got 1 and 2 features"):
        select_fisher_ratio(statistics([1.0]), statistics([1.0, 1.0]))
    with pytest.raises(UserError, match=r"`max_retain_frequency` must be in \[0, 1\]"):
        select_frequency(statistics([1.0]), statistics([1.0]), 1, 2.0)
