import math
from typing import Any

import pytest
import torch

from dsg.errors import UserError
from dsg.lm.reference import FrozenCopy
from dsg.lm.tokens import TokenBatch
from dsg.objectives.ga import GradientAscent
from dsg.objectives.npo import NPO
from dsg.objectives.terms import Loss
from tests.dsg.objectives.toys import (
    REFERENCE_TABLE,
    TABLE,
    TableModel,
    TableReference,
    hand_kls,
    hand_nlls,
    mean,
    token_batch,
)
from tests.helpers import BOS, tiny_model

FORGET, RETAIN = token_batch([BOS, 3, 1, 4], [BOS, 4], [BOS]), token_batch([BOS, 1, 3])


def forget_by_hand(beta: float) -> float:
    losses = []
    for ids in ([BOS, 3, 1, 4], [BOS, 4]):
        log_ratio = sum(hand_nlls(REFERENCE_TABLE, ids)) - sum(hand_nlls(TABLE, ids))
        # -(2/beta) log sigmoid(-beta r) = (2/beta) log(1 + (p/p_ref)^beta), Eq. 3.
        losses.append(2 / beta * math.log(1 + math.exp(log_ratio) ** beta))
    return mean(losses)


def npo(forget: TokenBatch = FORGET, **settings: Any) -> Loss:
    return NPO(**settings)(TableModel(TABLE), forget, RETAIN, reference=TableReference())


def test_by_hand():
    # p = .5 * .6 * .1 and .1; p_ref = .25 * .3 * .2 and .25, so p / p_ref = 2 and 0.4.
    expected = (2 * math.log(1 + 2) + 2 * math.log(1 + 0.4)) / 2
    assert forget_by_hand(1.0) == pytest.approx(expected, rel=1e-9)
    loss = npo(beta=1.0, retain="none")
    assert loss.forget.item() == pytest.approx(expected, rel=1e-6)
    assert loss.total.item() == loss.forget.item()
    assert loss.retain.item() == 0.0


def test_retain_terms_by_hand():
    nll, kl = mean(hand_nlls(TABLE, [BOS, 1, 3])), mean(hand_kls([BOS, 1, 3]))
    for term, expected in (("nll", nll), ("kl", kl)):
        loss = npo(beta=0.3, alpha=5.0, gamma=0.5, retain=term)
        assert loss.retain.item() == pytest.approx(expected, rel=1e-5)
        total = 0.5 * forget_by_hand(0.3) + 5.0 * expected
        assert loss.total.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_at_the_reference_it_is_two_over_beta_times_ln_2(model, beta):
    objective = NPO(beta=beta, retain="kl")
    loss = objective(model, FORGET, RETAIN, reference=FrozenCopy(model))
    assert loss.forget.item() == pytest.approx(2 / beta * math.log(2), rel=1e-7)
    assert loss.retain.item() == 0.0


def test_for_a_small_beta_the_gradient_is_that_of_ascent_on_sums():
    model, forget = tiny_model(), token_batch([BOS, 5, 6, 7], [BOS, 8, 9])
    reference = FrozenCopy(tiny_model(seed=1))
    objective = NPO(beta=1e-4, retain="none")
    small = objective(model, forget, RETAIN, reference=reference).total
    # Ascent on sequence sums: the token mean of 5 targets, times 5 targets over 2 sequences.
    ascent = GradientAscent()(model, forget, RETAIN).total * 5 / 2
    weights = list(model.parameters())
    for slope, expected in zip(
        torch.autograd.grad(small, weights), torch.autograd.grad(ascent, weights), strict=True
    ):
        torch.testing.assert_close(slope, expected, rtol=2e-2, atol=2e-3)


def test_what_is_forgotten_already_has_no_gradient_and_no_infinity():
    # log(p / p_ref) = -500 and 500: naive log(sigmoid()) would be 0 or -inf.
    certain, improbable = torch.zeros(5, 5), torch.zeros(5, 5)
    improbable[:, 3] = -500.0
    certain[:, 3] = 500.0
    forget = token_batch([BOS, 3])
    model, reference = TableModel(TABLE), TableReference()
    for ours, theirs, expected in ((improbable, certain, 0.0), (certain, improbable, 1000.0)):
        model.logits.data, reference.model.logits.data = ours, theirs
        objective = NPO(beta=1.0, retain="none")
        loss = objective(model, forget, RETAIN, reference=reference).total
        assert loss.item() == pytest.approx(expected, rel=1e-2, abs=1e-6)
        (slope,) = torch.autograd.grad(loss, model.logits)
        assert torch.isfinite(slope).all()


def test_it_sums_over_a_sequence_and_averages_over_sequences():
    both, one, other = (
        npo(token_batch(*sequences), beta=1.0, retain="none").total.item()
        for sequences in ([[BOS, 3, 1, 4], [BOS, 4]], [[BOS, 3, 1, 4]], [[BOS, 4]])
    )
    assert both == pytest.approx((one + other) / 2, rel=1e-6)


def test_defaults_are_the_papers():
    objective = NPO()
    settings = (objective.beta, objective.alpha, objective.gamma, objective.retain)
    assert settings == (0.1, 1.0, 1.0, "nll")
    assert NPO.needs_reference


def test_bad_settings():
    with pytest.raises(UserError, match=r"`reference` must be given for NPO, got None"):
        NPO()(TableModel(TABLE), FORGET, RETAIN)
    for beta in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match=r"`beta` must be positive and finite, got"):
            NPO(beta=beta)
    with pytest.raises(UserError, match=r"`gamma` must be at least 0"):
        NPO(gamma=-0.1)
