import pytest
import torch
from torch import nn

from dsg.errors import UserError
from dsg.lm.likelihood import mean_nll, next_token_logits
from dsg.lm.trainable import make_trainable
from dsg.objectives.task_vector import TaskVector
from tests.dsg.objectives.toys import TABLE, TableModel, hand_nlls, mean, token_batch
from tests.helpers import BOS, tiny_model

FORGET, RETAIN = token_batch([BOS, 5, 6, 7], [BOS, 8, 9]), token_batch([BOS, 10, 11])


def task_vector(model: nn.Module, **settings: float) -> TaskVector:
    objective = TaskVector(**settings)
    objective.prepare(model)
    return objective


def fine_tune(model: nn.Module, objective: TaskVector, num_steps: int = 3) -> None:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=1e-3)
    for _ in range(num_steps):
        optimizer.zero_grad()
        objective(model, FORGET, RETAIN).total.backward()
        optimizer.step()


@torch.no_grad()
def forget_nll(model: nn.Module) -> float:
    return mean_nll(next_token_logits(model, FORGET), FORGET).item()


def test_the_objective_is_the_likelihood_of_the_forget_text_by_hand():
    model = TableModel(TABLE)
    forget = token_batch([BOS, 3, 1, 4], [BOS, 4])
    loss = task_vector(model)(model, forget, token_batch([BOS, 3]))
    expected = mean(hand_nlls(TABLE, [BOS, 3, 1, 4]) + hand_nlls(TABLE, [BOS, 4]))
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)
    assert loss.forget.item() == loss.total.item()
    assert loss.retain.item() == 0.0
    assert len(model.attention_masks) == 1


def test_negation_by_hand():
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0, -4.0]])
    objective = task_vector(model, scale=0.5)
    model.weight.data = torch.tensor([[3.0, 2.0, -5.0]])
    objective.finish(model)
    torch.testing.assert_close(model.weight.data, torch.tensor([[0.0, 2.0, -3.5]]))


def test_scale_zero_gives_the_original_back_exactly(model):
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    objective = task_vector(model, scale=0.0)
    fine_tune(model, objective)
    assert any(not torch.equal(weight, before[n]) for n, weight in model.named_parameters())
    objective.finish(model)
    assert all(torch.equal(weight, before[n]) for n, weight in model.named_parameters())


def test_scale_one_mirrors_the_fine_tuned_weights(model):
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    objective = task_vector(model)
    fine_tune(model, objective)
    tuned = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    objective.finish(model)
    for name, weight in model.named_parameters():
        middle = (weight.double() + tuned[name].double()) / 2
        torch.testing.assert_close(middle, before[name].double(), rtol=0, atol=1e-6)


def test_it_makes_the_forget_text_less_likely(model):
    objective = task_vector(model)
    start = forget_nll(model)
    fine_tune(model, objective)
    learned = forget_nll(model)
    objective.finish(model)
    assert learned < start < forget_nll(model)


def test_a_lora_adapter_is_mirrored_in_its_product():
    model = make_trainable(tiny_model(), "lora")
    objective = task_vector(model, scale=2.0)
    fine_tune(model, objective)
    name = "base_model.model.model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    before = layer.get_delta_weight("default").detach().clone()
    assert before.abs().max() > 0
    objective.finish(model)
    torch.testing.assert_close(layer.get_delta_weight("default"), -2.0 * before)


def test_a_lora_adapter_at_scale_zero_is_off():
    model = make_trainable(tiny_model(), "lora")
    objective = task_vector(model, scale=0.0)
    fine_tune(model, objective)
    expected = tiny_model()(FORGET.input_ids).logits
    assert not torch.equal(model(FORGET.input_ids).logits, expected)
    objective.finish(model)
    torch.testing.assert_close(model(FORGET.input_ids).logits, expected, rtol=0, atol=0)


def test_frozen_weights_are_neither_kept_nor_changed(model):
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    objective = task_vector(model, scale=3.0)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    fine_tune(model, objective)
    objective.finish(model)
    moved = {n for n, weight in model.named_parameters() if not torch.equal(weight, before[n])}
    assert moved == {"lm_head.weight"}


def test_bad_input(model):
    with pytest.raises(UserError, match=r"`scale` must be at least 0 and finite, got -1.0"):
        task_vector(model, scale=-1.0)
    adapted = make_trainable(model, "lora")
    fine_tune(adapted, task_vector(adapted))
    with pytest.raises(UserError, match=r"the adapter must be new \(B = 0\).*lora_B"):
        task_vector(adapted)
    with pytest.raises(UserError, match=r"must have weights that require gradients, got none"):
        task_vector(adapted.requires_grad_(False))
