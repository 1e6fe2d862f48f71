import math

import pytest
import torch

from dsg.attacks import Evade, Task
from dsg.attacks.evade import soft_density
from dsg.errors import UserError
from dsg.guard.edit import Clamp
from dsg.guard.forward import guarded
from dsg.guard.gate import DensityGate, OpenGate
from dsg.guard.guard import Guard
from dsg.lm.tokens import TokenBatch
from dsg.sae.features import FeatureSlice
from dsg.sae.loading import slice_features
from tests.helpers import (
    HOOK_POINT,
    SAE_BUILDERS,
    gated_sae,
    jumprelu_sae,
    random_ids,
    standard_sae,
    topk_sae,
)


def guard_of(features, **changes) -> Guard:
    settings = {
        "uncounted_ids": [2],
        "pad_id": 0,
        "gate": DensityGate(0.1),
        "edit": Clamp(-5.0),
    }
    return Guard(features, hook_point=HOOK_POINT, **{**settings, **changes})


def batch_of(seed: int = 0) -> TokenBatch:
    ids = random_ids(3, 7, seed)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return TokenBatch(ids, mask, mask.bool())


def test_by_hand():
    # Two features that read coordinates 0 and 1; the second fires above 1 only.
    features = FeatureSlice(
        torch.tensor([3, 8]),
        W_enc=torch.eye(2),
        b_enc=torch.zeros(2),
        activation_threshold=torch.tensor([0.0, 1.0]),
        W_dec=torch.eye(2),
    )
    h = torch.tensor([[[2.0, 0.0], [-1.0, 4.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False]])
    # Distances from firing: (2, -1) and (-1, 3); root mean square sqrt(15 / 4).
    scale = 0.5 * math.sqrt(15 / 4)
    expected = sum(1 / (1 + math.exp(-u / scale)) for u in (2, 3)) / 2
    got = soft_density(guard_of(features), h, mask, 0.5)
    assert got.tolist() == pytest.approx([expected], rel=1e-6)
    assert soft_density(guard_of(features), h, torch.zeros_like(mask), 0.5).tolist() == [0.0]


@pytest.mark.parametrize("architecture", SAE_BUILDERS)
def test_margins_are_above_zero_exactly_where_features_are_active(architecture):
    sae = SAE_BUILDERS[architecture]()
    features = slice_features(sae, list(range(8)))
    h = torch.randn(50, features.d_in)
    active = features.encode(h) > 0
    assert active.any()
    assert not active.all()
    assert torch.equal(features.margin(h) > 0, active)


@pytest.mark.parametrize("make", [standard_sae, jumprelu_sae, gated_sae, topk_sae])
def test_it_tends_to_the_density(model, make):
    guard = guard_of(slice_features(make(), [0, 1]))
    batch = batch_of()
    density = guard.density(model, batch.input_ids, batch.attention_mask, batch.token_mask)
    assert 0 < density.mean() < 1
    with guarded(model, None) as forward:
        parts = Evade(softness=1e-6)(forward, batch, guard).parts
    assert parts["soft_density"].item() == pytest.approx(density.mean().item(), abs=1e-3)


@pytest.mark.parametrize("make", [standard_sae, jumprelu_sae, topk_sae])
def test_training_on_it_lowers_the_density(model, make):
    guard = guard_of(slice_features(make(), [0, 1]))
    batch = batch_of()
    masks = (batch.input_ids, batch.attention_mask, batch.token_mask)
    before = guard.density(model, *masks).mean()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        with guarded(model, None) as forward:
            loss = Evade(weight=50.0)(forward, batch, guard)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert guard.density(model, *masks).mean() < 0.5 * before


def test_the_total_is_the_task_plus_the_weighted_density(model):
    guard, batch = guard_of(slice_features(standard_sae(), [0, 1])), batch_of()
    with guarded(model, None) as forward:
        total, parts = Evade(weight=3.0)(forward, batch, guard)
        task = Task()(forward, batch, None)
    assert task.parts == {}
    assert parts["task"].item() == task.total.item()
    assert total.item() == pytest.approx(task.total.item() + 3 * parts["soft_density"].item())


def test_the_stream_is_read_before_a_guard_in_the_loop_edits_it(model):
    guard, batch = guard_of(slice_features(standard_sae(), [0, 1]), gate=OpenGate()), batch_of()
    seen = {}
    for name, attached in (("plain", None), ("guarded", guard)):
        with guarded(model, attached) as forward:
            seen[name] = Evade()(forward, batch, guard).parts
    assert seen["plain"]["soft_density"].item() == seen["guarded"]["soft_density"].item()
    assert seen["plain"]["task"].item() != seen["guarded"]["task"].item()


@pytest.mark.parametrize("settings", [{"weight": 0.0}, {"weight": math.inf}, {"softness": -1.0}])
def test_numbers_must_be_above_zero(settings):
    with pytest.raises(UserError, match=f"`{next(iter(settings))}` of the attacker must be"):
        Evade(**settings)
