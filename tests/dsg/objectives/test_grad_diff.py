import pytest
import torch

from dsg.errors import UserError
from dsg.objectives.ga import GradientAscent
from dsg.objectives.grad_diff import GradDiff
from tests.dsg.objectives.toys import (
    TABLE,
    TableModel,
    TableReference,
    hand_kls,
    hand_nlls,
    mean,
    token_batch,
)
from tests.helpers import BOS

FORGET, RETAIN = token_batch([BOS, 3, 1, 4], [BOS, 4]), token_batch([BOS, 1, 3])
# Per target, so that the longer sequence weighs more: (ln 2 + ln 1/0.6 + ln 10 + ln 10) / 4.
FORGET_NLL = mean(hand_nlls(TABLE, [BOS, 3, 1, 4]) + hand_nlls(TABLE, [BOS, 4]))
RETAIN_NLL = mean(hand_nlls(TABLE, [BOS, 1, 3]))


def test_the_hand_computed_likelihoods():
    assert pytest.approx((0.693147 + 0.510826 + 2.302585 + 2.302585) / 4, rel=1e-6) == FORGET_NLL


def test_gradient_ascent_by_hand():
    model = TableModel(TABLE)
    loss = GradientAscent()(model, FORGET, RETAIN)
    assert loss.forget.item() == pytest.approx(-FORGET_NLL, rel=1e-6)
    assert loss.total.item() == loss.forget.item()
    assert loss.retain.item() == 0.0
    assert len(model.attention_masks) == 1


def test_grad_diff_by_hand():
    loss = GradDiff(alpha=3.0, gamma=0.5)(TableModel(TABLE), FORGET, RETAIN)
    assert loss.forget.item() == pytest.approx(-FORGET_NLL, rel=1e-6)
    assert loss.retain.item() == pytest.approx(RETAIN_NLL, rel=1e-6)
    assert loss.total.item() == pytest.approx(-0.5 * FORGET_NLL + 3.0 * RETAIN_NLL, rel=1e-6)


def test_grad_diff_with_kl_by_hand():
    objective = GradDiff(alpha=3.0, retain="kl")
    loss = objective(TableModel(TABLE), FORGET, RETAIN, reference=TableReference())
    expected = mean(hand_kls([BOS, 1, 3]))
    assert loss.retain.item() == pytest.approx(expected, rel=1e-5)
    assert loss.total.item() == pytest.approx(-FORGET_NLL + 3.0 * expected, rel=1e-5)


def test_kl_is_zero_at_the_reference():
    reference = TableReference(TABLE)
    loss = GradDiff(retain="kl")(TableModel(TABLE), FORGET, RETAIN, reference=reference)
    assert loss.retain.item() == 0.0


def test_limits():
    model = TableModel(TABLE)
    # Without a retain term this is gradient ascent, without a forget term fine-tuning.
    ascent = GradientAscent()(model, FORGET, RETAIN).total
    assert GradDiff(retain="none")(model, FORGET, RETAIN).total.item() == ascent.item()
    assert GradDiff(alpha=0.0)(model, FORGET, RETAIN).total.item() == ascent.item()
    tuned = GradDiff(gamma=0.0)(model, FORGET, RETAIN).total
    assert tuned.item() == pytest.approx(RETAIN_NLL, rel=1e-6)
    (slope,) = torch.autograd.grad(tuned, model.logits)
    # Rows that only the forget batch uses do not move.
    assert slope[3].abs().max() == 0.0
    assert slope[BOS].abs().max() > 0.0


def test_defaults_are_the_papers():
    objective = GradDiff()
    assert (objective.alpha, objective.gamma, objective.retain) == (1.0, 1.0, "nll")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1.0}, r"`alpha` must be at least 0 and finite, got -1.0"),
        ({"gamma": float("nan")}, r"`gamma` must be at least 0 and finite, got nan"),
        ({"retain": "klr"}, r"`retain` must be one of \['none', 'nll', 'kl'\], got 'klr'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        GradDiff(**settings)


def test_kl_needs_its_reference():
    assert GradDiff(retain="kl").needs_reference
    assert not GradDiff(retain="nll").needs_reference
    with pytest.raises(UserError, match=r"`reference` must be given for the retain term 'kl'"):
        GradDiff(retain="kl")(TableModel(TABLE), FORGET, RETAIN)
