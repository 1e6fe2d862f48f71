import pytest
import torch
from peft import LoraConfig
from torch import nn

from dsg.errors import UserError
from dsg.lm.reference import AdapterOff, FrozenCopy
from dsg.lm.trainable import make_trainable
from tests.dsg.objectives.toys import token_batch
from tests.helpers import BOS, tiny_model

BATCH = token_batch([BOS, 5, 6, 7], [BOS, 8])


def adapted_model(**overrides: object) -> nn.Module:
    """A model whose adapter does something."""
    model = make_trainable(tiny_model(**overrides), "lora")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    return model


def plain_logits(**overrides: object) -> torch.Tensor:
    with torch.no_grad():
        return tiny_model(**overrides)(**BATCH.model_inputs()).logits


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1)


def test_a_frozen_copy_stays_what_the_model_was():
    model = tiny_model()
    reference = FrozenCopy(model)
    move(model)
    logits = reference.logits(BATCH)
    assert torch.equal(logits, plain_logits())
    assert not logits.requires_grad
    assert not torch.equal(model(**BATCH.model_inputs()).logits, logits)


def test_a_frozen_copy_has_no_dropout_and_does_not_touch_the_model():
    model = tiny_model(attention_dropout=0.5).train()
    reference = FrozenCopy(model)
    assert torch.equal(reference.logits(BATCH), plain_logits(attention_dropout=0.5))
    assert model.training
    assert all(weight.requires_grad for weight in model.parameters())


def test_neither_reference_is_part_of_its_parent():
    parent = nn.Module()
    parent.model = adapted_model()
    before = set(parent.state_dict())
    parent.copied, parent.off = FrozenCopy(parent.model), AdapterOff(parent.model)
    assert set(parent.state_dict()) == before
    assert len(list(parent.parameters())) == len(list(parent.model.parameters()))


def test_a_frozen_copy_keeps_the_adapter_on_and_adapter_off_does_not():
    model = adapted_model()
    with torch.no_grad():
        adapted = model(**BATCH.model_inputs()).logits
    assert torch.equal(FrozenCopy(model).logits(BATCH), adapted)
    assert torch.equal(AdapterOff(model).logits(BATCH), plain_logits())
    assert not torch.equal(adapted, plain_logits())


def test_adapter_off_restores_modes_and_what_is_trained():
    model = adapted_model(attention_dropout=0.5).train()
    model.base_model.model.model.layers[0].eval()
    # An adapter of which only B is trained: PEFT would make A trainable again.
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    reference = AdapterOff(model)
    assert torch.equal(reference.logits(BATCH), plain_logits(attention_dropout=0.5))
    assert [module.training for module in model.modules()] == modes
    assert {n for n, weight in model.named_parameters() if weight.requires_grad} == trained
    model.eval()
    assert not torch.equal(model(**BATCH.model_inputs()).logits, plain_logits())


def test_adapter_off_builds_no_graph_even_where_the_inputs_require_gradients():
    model = adapted_model()
    # As gradient checkpointing under a frozen base model needs it.
    model.enable_input_require_grads()
    assert not AdapterOff(model).logits(BATCH).requires_grad


def test_adapter_off_restores_after_an_error():
    model = adapted_model().train()
    reference = AdapterOff(model)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    broken = token_batch([BOS, 10_000])
    with pytest.raises(IndexError):
        reference.logits(broken)
    assert model.training
    assert {n for n, weight in model.named_parameters() if weight.requires_grad} == trained
    assert not torch.equal(model(**BATCH.model_inputs()).logits, plain_logits())


def test_both_read_the_attention_mask():
    for reference in (FrozenCopy(tiny_model()), AdapterOff(adapted_model())):
        left = token_batch([BOS, 8], [BOS, 5, 6, 7], side="left")
        alone = reference.logits(token_batch([BOS, 8]))
        torch.testing.assert_close(reference.logits(left)[0, 2:], alone[0], rtol=1e-4, atol=1e-5)


def test_adapter_off_needs_exactly_one_adapter():
    with pytest.raises(UserError, match=r"got LlamaForCausalLM with 0; merge earlier adapters"):
        AdapterOff(tiny_model())
    model = adapted_model()
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match=r"a PEFT model with one adapter.*with 2"):
        AdapterOff(model)


def test_adapter_off_refuses_a_base_that_moves():
    model = adapted_model()
    model.base_model.model.lm_head.requires_grad_(True)
    with pytest.raises(UserError, match=r"only the adapter may be trained.*lm_head.weight"):
        AdapterOff(model)


def test_a_frozen_copy_needs_a_language_model():
    with pytest.raises(UserError, match=r"`model` must be a Hugging Face PreTrainedModel"):
        FrozenCopy(nn.Linear(2, 2))
