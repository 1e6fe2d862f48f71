import pytest
import torch

from dsg.errors import UserError
from dsg.lm.trainable import make_trainable, trainable_weights
from tests.helpers import random_ids


def take_a_step(model) -> None:
    ids = random_ids(2, 6)
    optimizer = torch.optim.SGD(trainable_weights(model).values(), lr=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def test_lora_trains_the_adapter_and_nothing_else(model):
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    attacked = make_trainable(model, "lora", rank=2)
    assert all("lora_" in name for name in trainable_weights(attacked))
    take_a_step(attacked)
    raised = [w.norm() for name, w in attacked.named_parameters() if "lora_B" in name]
    assert len(raised) == 3 * 7
    assert all(norm > 0 for norm in raised)
    frozen = {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): weight
        for name, weight in attacked.named_parameters()
        if not weight.requires_grad
    }
    assert frozen.keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in frozen.items())


def test_a_new_adapter_does_not_change_the_model(model):
    ids = random_ids(2, 6)
    expected = model(ids).logits
    assert torch.equal(make_trainable(model, "lora")(ids).logits, expected)


def test_a_target_may_name_part_of_a_path(model):
    attacked = make_trainable(model, "lora", rank=2, targets=["self_attn.q_proj"])
    assert len(trainable_weights(attacked)) == 3 * 2


def test_full_trains_every_weight(model):
    model.requires_grad_(False)
    attacked = make_trainable(model, "full")
    assert attacked is model
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    take_a_step(attacked)
    assert not any(torch.equal(weight, before[n]) for n, weight in model.named_parameters())


def test_every_attack_starts_a_new_adapter(model):
    attacked = make_trainable(model, "lora")
    with pytest.raises(UserError, match=r"`model` must be a plain model without adapter"):
        make_trainable(attacked, "lora")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "prefix"}, r"`kind` must be 'full' or 'lora', got 'prefix'"),
        ({"kind": "lora", "targets": ["c_attn"]}, r"`targets` must name linear layers .*q_proj"),
        ({"kind": "lora", "targets": ["q_proj", "proj"]}, r"got \['proj'\]"),
        ({"kind": "lora", "targets": []}, r"`targets` must name linear layers"),
        ({"kind": "lora", "rank": 0}, r"`rank` of the adapter must be at least 1, got 0"),
    ],
)
def test_bad_settings(model, settings, message):
    with pytest.raises(UserError, match=message):
        make_trainable(model, **settings)
