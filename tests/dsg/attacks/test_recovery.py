import pytest

from dsg.attacks.recovery import (
    accuracy_curve,
    area_under_recovery,
    best_over_lr,
    epochs_to_half,
    recovered_shares,
)
from dsg.errors import UserError

# Base model 0.9, after forgetting 0.3: a lost accuracy of 0.6.
CURVE = [0.3, 0.45, 0.75, 0.9]


def test_shares_by_hand():
    assert recovered_shares(CURVE, 0.9) == pytest.approx([0.0, 0.25, 0.75, 1.0])


def test_area_by_hand():
    # Trapezoids 0.125, 0.5 and 0.875 over three epochs.
    assert area_under_recovery(CURVE, 0.9) == pytest.approx(1.5 / 3)


def test_half_is_reached_between_epochs():
    # A quarter after epoch 1, three quarters after epoch 2.
    assert epochs_to_half(CURVE, 0.9) == pytest.approx(1.5)
    assert epochs_to_half([0.3, 0.6, 0.9], 0.9) == pytest.approx(1.0)
    assert epochs_to_half([0.3, 0.9, 0.3], 0.9) == pytest.approx(0.5)
    assert epochs_to_half([0.3, 0.4, 0.5], 0.9) is None


def test_shares_stay_between_nothing_and_everything():
    assert recovered_shares([0.5, 0.2, 1.0], 0.9) == [0.0, 0.0, 1.0]
    assert area_under_recovery([0.5, 0.2, 1.0], 0.9) == pytest.approx(0.25)


@pytest.mark.parametrize("accuracies", [[0.9, 0.9], [0.95, 0.9]])
def test_where_nothing_was_lost_nothing_can_be_recovered(accuracies):
    assert recovered_shares(accuracies, 0.9) is None
    assert area_under_recovery(accuracies, 0.9) is None
    assert epochs_to_half(accuracies, 0.9) is None


def test_an_attack_without_an_epoch():
    assert area_under_recovery([0.3], 0.9) is None
    assert epochs_to_half([0.3], 0.9) is None
    with pytest.raises(UserError, match="`accuracies` must hold that before the attack"):
        area_under_recovery([], 0.9)


def test_the_best_attack_is_the_one_that_ends_highest():
    runs = {1e-3: [0.3, 0.9, 0.5], 1e-4: [0.3, 0.4, 0.6], 1e-5: [0.3, 0.3, 0.6]}
    assert best_over_lr(runs) == (1e-5, [0.3, 0.3, 0.6])
    assert best_over_lr({1e-3: runs[1e-3]}).lr == 1e-3
    for nothing in ({}, {1e-3: []}):
        with pytest.raises(UserError, match="`runs` must hold at least one attack"):
            best_over_lr(nothing)


def result(epoch, value, guard="on", domain="forget", metric="accuracy", protocol="cloze"):
    return {
        "epoch": epoch,
        "value": value,
        "guard": guard,
        "domain": domain,
        "metric": metric,
        "protocol": protocol,
    }


def test_a_curve_out_of_rows_in_any_order():
    rows = [
        result(2, 0.7),
        result(0, 0.3),
        result(1, 0.5),
        result(1, 0.9, guard="off"),
        result(1, 0.1, metric="perplexity"),
        result(1, 0.2, protocol="cloze_question"),
        result(1, 0.8, domain="retain"),
    ]
    assert accuracy_curve(rows, guard="on", domain="forget") == [0.3, 0.5, 0.7]


@pytest.mark.parametrize("columns", [{"guard": "on"}, {"guard": "none"}, {"domain": "retain"}])
def test_a_curve_needs_one_accuracy_per_epoch(columns):
    rows = [result(0, 0.3), result(0, 0.9, domain="retain"), result(2, 0.9, domain="retain")]
    with pytest.raises(UserError, match="must choose one accuracy per epoch from 0 on"):
        accuracy_curve(rows, **columns)
