from typing import Any

import pytest
import torch
from torch import nn

from dsg.errors import UserError
from dsg.lm.tokens import TokenBatch, pad_sequences
from dsg.lm.trainable import make_trainable
from dsg.objectives.rmu import RMU, control_direction, masked_mse, trainable_names
from tests.helpers import BOS, HOOK_POINT, PAD, tiny_model


def token_batch(*sequences: list[int]) -> TokenBatch:
    return pad_sequences(sequences, PAD, [PAD, BOS])


def rmu(model: nn.Module, **settings: Any) -> RMU:
    objective = RMU(HOOK_POINT, **settings)
    objective.prepare(model)
    return objective


FORGET = token_batch([BOS, 5, 6, 7], [BOS, 8])
RETAIN = token_batch([BOS, 9, 10])


def test_masked_mse_by_hand():
    activations = torch.tensor([[[1.0, 3.0], [0.0, 0.0], [2.0, 2.0]]])
    mask = torch.tensor([[True, False, True]])
    # Tokens 0 and 2 against (1, 1): (0 + 4) / 2 = 2 and (1 + 1) / 2 = 1; their mean is 1.5.
    assert masked_mse(activations, torch.ones(2), mask) == pytest.approx(1.5)


def test_control_direction_is_a_fixed_non_negative_unit_vector():
    direction = control_direction(64, seed=3)
    assert torch.equal(direction, control_direction(64, seed=3))
    assert not torch.equal(direction, control_direction(64, seed=4))
    assert direction.min() >= 0
    assert direction.norm() == pytest.approx(1.0)


def test_loss_before_training_matches_an_independent_float64_computation(model):
    objective = rmu(model, steering=3.0, alpha=7.0, control_seed=5)
    loss = objective(model, FORGET, RETAIN)
    drawn = torch.rand(16, generator=torch.Generator().manual_seed(5)).double()
    target = 3.0 * drawn / drawn.norm()
    distances = []
    for ids in ([BOS, 5, 6, 7], [BOS, 8]):
        # hidden_states[2] is the output of layer 1; the bos token does not count.
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2]
        distances += [((h.double() - target) ** 2).mean().item() for h in states[0, 1:]]
    assert loss.forget.item() == pytest.approx(sum(distances) / 4, rel=1e-5)
    assert loss.retain.item() == 0.0
    assert loss.total.item() == pytest.approx(loss.forget.item())


def test_reference_stays_the_original_model_while_weights_move(model):
    objective = rmu(model, alpha=2.0)
    original = tiny_model()
    with torch.no_grad():
        for name in objective.original:
            model.get_decoder().get_parameter(name).add_(0.1)
    loss = objective(model, FORGET, RETAIN)
    ids = RETAIN.input_ids
    changed, reference = (
        m(ids, output_hidden_states=True).hidden_states[2][0, 1:].double()
        for m in (model, original)
    )
    expected = ((changed - reference) ** 2).mean().item()
    assert loss.retain.item() == pytest.approx(expected, rel=1e-5)
    assert expected > 0
    assert loss.total.item() == pytest.approx((loss.forget + 2.0 * loss.retain).item())


def test_training_lowers_the_loss_and_touches_nothing_else(model):
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    objective = rmu(model, steering=5.0, num_layers=1)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    losses = []
    for _ in range(5):
        loss = objective(model, FORGET, RETAIN).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {n for n, weight in model.named_parameters() if not torch.equal(weight, before[n])}
    assert moved == {"model.layers.1.mlp.down_proj.weight"}


def test_padding_changes_nothing(model):
    objective = rmu(model)
    padded = token_batch([BOS, 5, 6, 7], [BOS, 8], [BOS] + [11] * 9)
    padded = TokenBatch(padded.input_ids[:2], padded.attention_mask[:2], padded.token_mask[:2])
    expected, actual = objective(model, FORGET, RETAIN), objective(model, padded, RETAIN)
    torch.testing.assert_close(actual.total, expected.total)


def test_names_are_the_down_projections_of_the_last_layers(model):
    expected = [f"layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
    assert trainable_names(model, HOOK_POINT) == expected
    assert trainable_names(model, "model.layers.1", num_layers=1) == expected[1:]


def test_a_target_that_matches_nothing(model):
    with pytest.raises(UserError, match=r"`target` must be part of a weight's name.*'fc9'"):
        rmu(model, target="fc9")


def test_a_hook_point_that_is_no_layer(model):
    with pytest.raises(UserError, match=r"`hook_point` must name a decoder layer for RMU"):
        RMU("model.layers.1.mlp", target="down_proj").prepare(model)


def test_of_an_adapter_it_trains_what_lies_in_its_layers(model):
    adapted = make_trainable(model, "lora", targets=["down_proj", "q_proj"])
    objective = rmu(adapted, num_layers=1, target="mlp.", steering=5.0)
    trained = {n for n, weight in adapted.named_parameters() if weight.requires_grad}
    assert {name.split("base_model.model.model.")[1] for name in trained} == {
        f"layers.1.mlp.down_proj.lora_{factor}.default.weight" for factor in "AB"
    }
    with torch.no_grad():
        for name in trained:
            adapted.get_parameter(name).normal_()
    loss = objective(adapted, FORGET, RETAIN)
    changed = adapted(RETAIN.input_ids, output_hidden_states=True).hidden_states[2][0, 1:]
    original = tiny_model()(RETAIN.input_ids, output_hidden_states=True).hidden_states[2][0, 1:]
    expected = (changed.double() - original.double()).square().mean().item()
    assert loss.retain.item() == pytest.approx(expected, rel=1e-4)


def test_an_adapter_elsewhere(model):
    adapted = make_trainable(model, "lora", targets=["q_proj"])
    with pytest.raises(UserError, match=r"`target` must match weights that are trained, got 'mlp."):
        rmu(adapted, target="mlp.")


def test_bad_settings():
    with pytest.raises(UserError, match=r"`steering` must be positive and finite, got 0.0"):
        RMU(HOOK_POINT, steering=0.0)
    with pytest.raises(UserError, match=r"`alpha` must be at least 0 and finite, got -1.0"):
        RMU(HOOK_POINT, alpha=-1.0)
    with pytest.raises(UserError, match=r"`num_layers` must be positive and finite, got 0"):
        RMU(HOOK_POINT, num_layers=0)
