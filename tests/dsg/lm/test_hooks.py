import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from dsg.errors import UserError
from dsg.lm.hooks import (
    check_width,
    hidden_states,
    is_reading,
    read_activations,
    resolve_hook_point,
    unwrap,
)
from dsg.lm.tokens import pad_sequences
from tests.helpers import random_ids, tiny_model


def batch_of(ids):
    return pad_sequences(ids.tolist(), pad_id=0, uncounted_ids=[0, 1, 2])


def lora(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def test_block_name_and_module_path_are_the_same_module(model):
    layer = model.model.layers[2]
    assert resolve_hook_point(model, "blocks.2.hook_resid_post") is layer
    assert resolve_hook_point(model, "model.layers.2") is layer


def test_the_stream_before_a_layer_is_the_output_of_the_layer_below(model):
    assert resolve_hook_point(model, "blocks.2.hook_resid_pre") is model.model.layers[1]
    with pytest.raises(UserError, match=r"got 'blocks.0.hook_resid_pre', which is the embedding"):
        resolve_hook_point(model, "blocks.0.hook_resid_pre")


@pytest.mark.parametrize(
    ("hook_point", "message"),
    [
        ("blocks.9.hook_resid_post", "one of the model's 3 decoder layers, got 'blocks.9"),
        ("blocks.3.hook_resid_pre", "one of the model's 3 decoder layers, got 'blocks.3"),
        ("blocks.1.hook_resid_mid", "which lies inside the layer, before its MLP; use 'blocks.1."),
        ("blocks.1.hook_attn_out", "got 'blocks.1.hook_attn_out', which lies in its attention"),
        ("blocks.1.attn.hook_z", "which lies in its attention; use 'blocks.1.hook_resid_post'"),
        ("blocks.1.hook_mlp_out", "which lies in its MLP; use 'blocks.1.hook_resid_post'"),
        ("blocks.1.mlp.hook_post", "got 'blocks.1.mlp.hook_post', which lies in its MLP"),
        ("blocks.1.ln2.hook_normalized", "which lies in a normalization"),
        ("hook_embed", "which is the embedding; use 'blocks.0.hook_resid_post'"),
        ("ln_final.hook_normalized", "which is the final norm; use 'blocks.2.hook_resid_post'"),
        ("blocks.1.hook_resid_pst", "near names are blocks.1.hook_resid_post"),
        ("model.layer.1", "near names are model.layers.1"),
        ("", "must name a module of LlamaForCausalLM"),
    ],
)
def test_unknown_hook_point_lists_near_names(model, hook_point, message):
    with pytest.raises(UserError, match=message):
        resolve_hook_point(model, hook_point)


def test_unwrap_peels_peft_and_module_wrappers(model):
    wrapper = nn.Module()
    wrapper.module = model
    assert unwrap(wrapper) is model
    assert unwrap(lora(model)) is model


def test_unwrap_refuses_other_modules():
    with pytest.raises(UserError, match=r"must be a Hugging Face PreTrainedModel .* got Linear"):
        unwrap(nn.Linear(2, 2))


def test_width_mismatch_names_both_widths(model):
    check_width(model, 16)
    with pytest.raises(UserError, match="residual width 16, got 8"):
        check_width(model, 8)


@pytest.mark.parametrize("wrap", [lambda model: model, lora])
def test_read_activations_equals_hidden_states(model, wrap):
    batch = batch_of(random_ids(2, 5))
    wrapped = wrap(model)
    with torch.no_grad():
        expected = model(**batch.model_inputs(), output_hidden_states=True).hidden_states
    # hidden_states[0] is the embedding, so layer 1's output is entry 2.
    actual = read_activations(wrapped, "blocks.1.hook_resid_post", batch)
    assert torch.equal(actual, expected[2])


def test_read_activations_stops_early_and_leaves_no_trace():
    model = tiny_model(attention_dropout=0.5)
    model.train()
    model.model.norm.eval()
    ran = []
    model.model.layers[2].register_forward_hook(lambda *_: ran.append(1))
    batch = batch_of(random_ids(2, 5))
    first = read_activations(model, "blocks.1.hook_resid_post", batch)
    assert torch.equal(first, read_activations(model, "blocks.1.hook_resid_post", batch))
    assert not ran
    assert not first.requires_grad
    assert not model.model.layers[1]._forward_hooks
    assert not is_reading()
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.norm.training


def test_read_activations_refuses_a_module_that_never_runs(model):
    model.unused = nn.Linear(16, 16)
    with pytest.raises(UserError, match="the model never calls it"):
        read_activations(model, "unused", batch_of(random_ids(1, 3)))
    assert not is_reading()


def test_positions_of_left_padding_begin_at_the_first_token():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2)).eval()
    ids = random_ids(1, 4)[0].tolist()
    left = pad_sequences([ids, [5] * 7], 0, [0], side="left")
    alone = read_activations(model, "blocks.0.hook_resid_post", batch_of(torch.tensor([ids])))
    padded = read_activations(model, "blocks.0.hook_resid_post", left)
    torch.testing.assert_close(padded[:1, 3:], alone, atol=1e-6, rtol=1e-6)


def test_hidden_states_of_tensor_and_tuple():
    h = torch.zeros(1, 2, 3)
    assert hidden_states(h) is h
    assert hidden_states((h, None)) is h
