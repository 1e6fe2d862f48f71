import pytest
import torch

from dsg.errors import UserError
from dsg.lm.reference import FrozenCopy
from dsg.objectives.scrub import SCRUB
from tests.dsg.objectives.toys import (
    TABLE,
    TableModel,
    TableReference,
    hand_kls,
    hand_nlls,
    mean,
    token_batch,
)
from tests.helpers import BOS, tiny_model

FORGET, RETAIN = token_batch([BOS, 3, 1, 4], [BOS, 4]), token_batch([BOS, 1, 3])
# T^2 KL of the tempered distributions, T = 2.
FORGET_KL = 4 * mean(hand_kls([BOS, 3, 1, 4], 2.0) + hand_kls([BOS, 4], 2.0))
RETAIN_KL = 4 * mean(hand_kls([BOS, 1, 3], 2.0))
RETAIN_NLL = mean(hand_nlls(TABLE, [BOS, 1, 3]))


def scrub(**settings: float) -> SCRUB:
    return SCRUB(**{"alpha": 0.5, "beta": 0.1, "gamma": 3.0, **settings})


def test_a_max_step_by_hand():
    model = TableModel(TABLE)
    loss = scrub()(model, FORGET, RETAIN, reference=TableReference(), step=0)
    assert loss.forget.item() == pytest.approx(-FORGET_KL, rel=1e-5)
    assert loss.total.item() == pytest.approx(-0.1 * FORGET_KL, rel=1e-5)
    assert loss.retain.item() == 0.0
    assert len(model.attention_masks) == 1


def test_a_min_step_by_hand():
    model = TableModel(TABLE)
    loss = scrub()(model, FORGET, RETAIN, reference=TableReference(), step=1)
    expected = 0.5 * RETAIN_KL + 3.0 * RETAIN_NLL
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert loss.retain.item() == loss.total.item()
    assert loss.forget.item() == 0.0
    assert len(model.attention_masks) == 1


@pytest.mark.parametrize(
    ("optimizer", "least", "most"), [(torch.optim.SGD, 0.0, 1e-6), (torch.optim.AdamW, 1e-2, 1.0)]
)
def test_the_first_max_step_follows_rounding_errors(optimizer, least, most):
    """How far the weights move, in learning rates: Adam's step hides how small the gradient is."""
    model = tiny_model()
    teacher = FrozenCopy(model)
    weights = list(model.requires_grad_(True).parameters())
    before = [weight.detach().clone() for weight in weights]
    batch = token_batch([BOS, 5, 9, 4, 17, 22], [BOS, 8, 11])
    loss = scrub()(model, batch, batch, reference=teacher, step=0).total
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    loss.backward()
    optimizer(weights, lr=1e-3, weight_decay=0.0).step()
    moved = max((w - b).abs().max().item() for w, b in zip(weights, before, strict=True))
    assert least <= moved / 1e-3 <= most


def test_without_a_step_both_terms_are_added():
    loss = scrub()(TableModel(TABLE), FORGET, RETAIN, reference=TableReference())
    expected = -0.1 * FORGET_KL + 0.5 * RETAIN_KL + 3.0 * RETAIN_NLL
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)


def test_max_and_min_alternate_until_only_min_is_left():
    assert [scrub().maximises(step) for step in range(4)] == [True, False, True, False]
    short = SCRUB(max_steps=3)
    assert [short.maximises(step) for step in range(6)] == [True, False, True] + [False] * 3
    shorter = SCRUB(max_steps=2)
    assert [shorter.maximises(step) for step in range(4)] == [True] + [False] * 3


def test_at_the_reference_only_the_likelihood_has_a_gradient(model):
    reference = FrozenCopy(model)
    loss = SCRUB(gamma=0.0)(model, FORGET, RETAIN, reference=reference)
    assert loss.total.item() == 0.0
    slopes = torch.autograd.grad(loss.total, list(model.parameters()))
    assert max(slope.abs().max().item() for slope in slopes) < 1e-5
    loss = SCRUB()(model, FORGET, RETAIN, reference=reference)
    slopes = torch.autograd.grad(loss.total, list(model.parameters()))
    assert max(slope.abs().max().item() for slope in slopes) > 1e-3


def test_defaults_are_those_of_table_5():
    objective = SCRUB()
    settings = (objective.alpha, objective.beta, objective.gamma, objective.temperature)
    assert settings == (1.0, 1.0, 1.0, 2.0)


def test_bad_settings():
    with pytest.raises(UserError, match=r"`reference` must be given for SCRUB, got None"):
        SCRUB()(TableModel(TABLE), FORGET, RETAIN)
    with pytest.raises(UserError, match=r"`temperature` must be positive and finite, got 0"):
        scrub(temperature=0.0)
    with pytest.raises(UserError, match=r"`alpha` must be at least 0 and finite, got -1"):
        scrub(alpha=-1.0)
    with pytest.raises(UserError, match=r"`max_steps` must be at least 1, got 0"):
        SCRUB(max_steps=0)
