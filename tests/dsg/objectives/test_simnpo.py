import math

import pytest
import torch

from dsg.errors import UserError
from dsg.objectives.simnpo import SimNPO
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

FORGET, RETAIN = token_batch([BOS, 3, 1, 4], [BOS, 4], [BOS]), token_batch([BOS, 1, 3])


def forget_by_hand(beta: float, delta: float) -> float:
    losses = []
    for ids in ([BOS, 3, 1, 4], [BOS, 4]):
        per_token = mean(hand_nlls(TABLE, ids))
        losses.append(2 / beta * math.log(1 + math.exp(-beta * (per_token - delta))))
    return mean(losses)


def test_by_hand():
    # NLL per token: -ln(.03)/3 and -ln(.1); for beta 3 exp(-beta NLL) = .03 and .001.
    expected = (math.log(1.03) + math.log(1.001)) / 2 * 2 / 3
    assert forget_by_hand(3.0, 0.0) == pytest.approx(expected, rel=1e-9)
    loss = SimNPO(beta=3.0, gamma=1.0, retain="none")(TableModel(TABLE), FORGET, RETAIN)
    assert loss.forget.item() == pytest.approx(expected, rel=1e-5)
    assert loss.total.item() == loss.forget.item()


@pytest.mark.parametrize("term", ["nll", "kl"])
def test_margin_weights_and_retain_terms_by_hand(term):
    hand = hand_nlls(TABLE, [BOS, 1, 3]) if term == "nll" else hand_kls([BOS, 1, 3])
    objective = SimNPO(beta=2.0, delta=0.7, alpha=5.0, gamma=0.5, retain=term)
    loss = objective(TableModel(TABLE), FORGET, RETAIN, reference=TableReference())
    assert loss.forget.item() == pytest.approx(forget_by_hand(2.0, 0.7), rel=1e-5)
    assert loss.retain.item() == pytest.approx(mean(hand), rel=1e-5)
    total = 0.5 * forget_by_hand(2.0, 0.7) + 5.0 * mean(hand)
    assert loss.total.item() == pytest.approx(total, rel=1e-5)


def test_for_a_certain_text_it_is_two_over_beta_times_ln_2():
    model = TableModel(TABLE)
    model.logits.data = torch.zeros(5, 5)
    model.logits.data[:, 3] = 200.0
    loss = SimNPO(beta=0.5, retain="none")(model, token_batch([BOS, 3, 3]), RETAIN)
    assert loss.forget.item() == pytest.approx(4 * math.log(2), rel=1e-7)


def test_repeating_a_text_changes_nothing_because_length_is_divided_out():
    model = TableModel(TABLE)
    objective = SimNPO(retain="none")
    once, often = [BOS, *([3, 1] * 2)], [BOS, *([3, 1] * 50)]
    # All tokens but the first are equally likely in turn, so make the first alike too.
    model.logits.data[BOS] = model.logits.data[1]
    short, long = (
        objective(model, token_batch(ids), RETAIN).forget.item() for ids in (once, often)
    )
    assert long == pytest.approx(short, rel=1e-5)


def test_defaults_are_the_papers_for_tofu_forget10():
    objective = SimNPO()
    assert (objective.beta, objective.delta) == (4.5, 0.0)
    assert (objective.alpha, objective.gamma, objective.retain) == (1.0, 0.125, "nll")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, r"`beta` must be positive and finite, got 0.0"),
        ({"delta": -1.0}, r"`delta` must be at least 0 and finite, got -1.0"),
        ({"retain": "klr"}, r"`retain` must be one of"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        SimNPO(**settings)


def test_kl_needs_its_reference():
    assert SimNPO(retain="kl").needs_reference
    with pytest.raises(UserError, match=r"`reference` must be given for the retain term 'kl'"):
        SimNPO(retain="kl")(TableModel(TABLE), FORGET, RETAIN)
