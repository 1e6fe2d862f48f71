"""Nothing runs unguarded in silence: what a guard cannot follow is refused."""

import pytest
import torch

from dsg.errors import UserError
from dsg.guard.guard import Guard
from dsg.lm.identity import ModelIdentity
from tests.guard_reference import make_guard
from tests.helpers import VOCAB_SIZE, random_ids, standard_sae, tiny_model

SAE = standard_sae()
IDS = random_ids(3, 6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_activations_are_refused(model, value):
    guard = make_guard(SAE)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = value
    with (
        guard.attached(model),
        pytest.raises(UserError, match=r"activations at 'blocks\.1\.hook_resid_post' must be fin"),
    ):
        model(IDS)
    with pytest.raises(UserError, match="must be finite, got nan or inf in"):
        guard.density(model, IDS)


def test_non_finite_padding_is_no_concern(model):
    def spoil(_module, _args, output):
        output = output.clone()
        output[:, 0] = torch.nan
        return output

    handle = model.model.layers[1].register_forward_hook(spoil)
    mask = torch.ones_like(IDS)
    mask[:, 0] = 0
    try:
        with make_guard(SAE, threshold=1.0).attached(model) as attachment:
            model(IDS, attention_mask=mask)
    finally:
        handle.remove()
    assert attachment.density.isfinite().all()


def remove_then_run(model):
    model(IDS)
    model.model.layers[1]._forward_hooks.clear()
    model(IDS)


def test_a_removed_hook_is_found_before_the_next_pass(model):
    with pytest.raises(UserError, match="but one was removed"), make_guard(SAE).attached(model):
        remove_then_run(model)


def test_removing_every_hook_is_found_at_the_end(model):
    def unguarded():
        with make_guard(SAE).attached(model):
            for module in model.modules():
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()
            model(IDS)

    with pytest.raises(UserError, match="the model may have run unguarded"):
        unguarded()
    with make_guard(SAE).attached(model):  # and the model can be guarded again
        model(IDS)


def test_a_replaced_layer_is_found(model):
    with make_guard(SAE).attached(model):
        model.model.layers[1] = tiny_model(seed=3).model.layers[1]
        with pytest.raises(UserError, match="must run in each forward pass"):
            model(IDS)


def test_a_changed_vocabulary_is_refused(model):
    with make_guard(SAE).attached(model):
        model.resize_token_embeddings(VOCAB_SIZE + 2)
        with pytest.raises(UserError, match=r"must stay at 30 tokens .* got 32"):
            model(IDS)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_layers": 4}, "num_layers 3 like"),
        ({"vocab_size": VOCAB_SIZE + 1}, "vocab_size 30 like"),
    ],
)
def test_a_guard_of_another_model_is_refused(model, tmp_path, other, message):
    guard = make_guard(SAE, model=ModelIdentity.of(model))
    guard.save(tmp_path)
    loaded = Guard.load(tmp_path)
    assert loaded.model == guard.model
    with loaded.attached(model):
        model(IDS)
    with pytest.raises(UserError, match=message), loaded.attached(tiny_model(**other)):
        pytest.fail("attached")


def test_a_copy_under_another_name_is_accepted(model):
    guard = make_guard(SAE, model=ModelIdentity.of(model))
    attacked = tiny_model(seed=5)
    attacked.config.name_or_path = "runs/relearned"
    with guard.attached(attacked):
        attacked(IDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, "got beam search"),
        ({"num_beams": 2, "do_sample": True}, "got beam sample"),
        ({"prompt_lookup_num_tokens": 2}, "got assisted generation"),
        ({"assistant_model": tiny_model(seed=8)}, "got assisted generation"),
        ({"use_cache": False}, "`use_cache` must be true"),
        ({"cache_implementation": "static"}, "got 'static'"),
        ({"prefill_chunk_size": 2}, "`prefill_chunk_size` must be None"),
    ],
)
def test_generation_that_cannot_be_followed_is_refused_before_any_token(model, options, message):
    passes = []
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    with make_guard(SAE).attached(model), pytest.raises(UserError, match=message):
        model.generate(IDS, max_new_tokens=3, **options)
    assert passes == []
    assert "generate" not in vars(model)


def test_a_generation_config_is_looked_at_too(model):
    model.generation_config.num_beams = 2
    with make_guard(SAE).attached(model), pytest.raises(UserError, match="got beam search"):
        model.generate(IDS, max_new_tokens=3)
    with make_guard(SAE).attached(model):
        model.generate(IDS, max_new_tokens=3, num_beams=1, do_sample=False)


def test_packed_sequences_are_refused(model):
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand_as(IDS)
    with make_guard(SAE).attached(model):
        with pytest.raises(UserError, match=r"got packed sequences \(position_ids start"):
            model(IDS, position_ids=positions)
        with pytest.raises(UserError, match=r"got packed sequences \(cu_seq_lens_q\)"):
            model(IDS, cu_seq_lens_q=torch.tensor([0, 3, 6]))
        # Positions of left padding are no second sequence.
        mask = torch.tensor([[0, 0, 1, 1, 1, 1]]).expand_as(IDS)
        model(IDS, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))


def test_a_module_of_another_width_is_refused(model):
    guard = make_guard(SAE, hook_point="model.layers.1.mlp.up_proj")
    with guard.attached(model), pytest.raises(UserError, match="must be 16 wide like the SAE's"):
        model(IDS)
    with pytest.raises(UserError, match="must be 16 wide like the SAE's input, got 32"):
        guard.density(model, IDS)


def test_hidden_states_are_the_edited_ones_whatever_was_asked_for_before(model):
    guard = make_guard(SAE, threshold=0.0)
    plain = model(IDS, output_hidden_states=True).hidden_states
    with guard.attached(model):
        edited = model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(edited[1], plain[1])
    assert not torch.equal(edited[2], plain[2])


def test_gradients_of_an_earlier_pass_are_refused(model):
    guard = make_guard(SAE, hook_point="model.layers.1.mlp", threshold=0.0)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with guard.attached(model):
        losses = [model(random_ids(3, 6, seed), labels=IDS).loss for seed in (1, 2)]
        with pytest.raises(UserError, match="call `backward` before the next pass"):
            (losses[0] + losses[1]).backward()
