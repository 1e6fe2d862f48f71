import pytest
import torch
from torch import nn

from dsg.errors import UserError
from dsg.objectives.rmu import RMU, control_direction, masked_mse, trainable_names
from dsg.tokens import TokenBatch, pad_sequences
from tests.helpers import BOS, HOOK_POINT, PAD, tiny_model


def token_batch(*sequences: list[int]) -> TokenBatch:
    return pad_sequences(sequences, PAD, [PAD, BOS])


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
    objective = RMU(model, HOOK_POINT, steering=3.0, alpha=7.0, seed=5)
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
    objective = RMU(model, HOOK_POINT, alpha=2.0)
    original = tiny_model()
    with torch.no_grad():
        for name in objective.trainable:
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
    objective = RMU(model, HOOK_POINT, steering=5.0, num_layers=1)
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
    objective = RMU(model, HOOK_POINT)
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
        RMU(model, HOOK_POINT, target="fc9")


def test_a_hook_point_that_is_no_layer(model):
    with pytest.raises(UserError, match=r"`hook_point` must name a decoder layer for RMU"):
        RMU(model, "model.layers.1.mlp", target="down_proj")


def test_control_is_a_buffer_of_the_objective(model):
    objective = RMU(model, HOOK_POINT)
    assert isinstance(objective, nn.Module)
    assert set(objective.state_dict()) == {"control"}
