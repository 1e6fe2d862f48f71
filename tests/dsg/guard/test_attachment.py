import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dsg.errors import UserError
from dsg.lm.tokens import pad_sequences
from tests.guard_reference import UNCOUNTED, make_guard, reference
from tests.helpers import random_ids, standard_sae, tiny_model

SAE = standard_sae()
IDS = random_ids(6, 8)


def mixed_guard(model, **changes):
    """A guard that triggers on some rows of IDS but not on all."""
    guard = make_guard(SAE, **changes)
    guard = guard.replace(threshold=guard.density(model, IDS).median().item())
    triggered = guard.density(model, IDS) > guard.threshold
    assert triggered.any()
    assert not triggered.all()
    return guard, triggered


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untriggered_rows_are_bit_identical_in_a_mixed_batch(dtype):
    model = tiny_model().to(dtype)
    guard, triggered = mixed_guard(model)
    plain = model(IDS).logits
    with guard.attached(model) as attachment:
        guarded = model(IDS).logits
    assert guarded.dtype == dtype
    assert torch.equal(attachment.triggered, triggered)
    assert torch.equal(guarded[~triggered], plain[~triggered])
    assert not (guarded[triggered] == plain[triggered]).all(-1).all(-1).any()
    assert torch.equal(model(IDS).logits, plain)


def test_layer_output_is_the_very_tensor_when_no_row_is_edited(model):
    outputs = []
    layer = model.model.layers[1]
    handle = layer.register_forward_hook(lambda _m, _a, output: outputs.append(output))
    with make_guard(SAE, threshold=1.0).attached(model):
        layer.register_forward_hook(lambda _m, _a, output: outputs.append(output))
        model(IDS)
    handle.remove()
    assert outputs[0] is outputs[1]


def test_detached_after_an_exception(model):
    plain = model(IDS).logits
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(RuntimeError, match="boom"), make_guard(SAE).attached(model):
        raise RuntimeError("boom")
    assert torch.equal(model(IDS).logits, plain)
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert after == hooks


def test_attaching_refuses_before_any_token(model):
    with (
        pytest.raises(UserError, match="residual width 16, got 8"),
        make_guard(standard_sae(d_in=8)).attached(model),
    ):
        pytest.fail("attached")
    with (
        pytest.raises(UserError, match=r"near names are .*blocks\.1\.hook_resid_post"),
        make_guard(SAE, hook_point="block.1.hook_resid_post").attached(model),
    ):
        pytest.fail("attached")
    with (
        pytest.raises(UserError, match="must lie inside the decoder LlamaModel, got 'lm_head'"),
        make_guard(SAE, hook_point="lm_head").attached(model),
    ):
        pytest.fail("attached")
    for options in ({"decision": "batch"}, {"continuation": "sticky"}):
        with (
            pytest.raises(UserError, match=f"`{next(iter(options))}` must be one of"),
            make_guard(SAE).attached(model, **options),
        ):
            pytest.fail("attached")


def test_attaching_twice_is_refused_also_through_a_wrapper(model):
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    guard = make_guard(SAE)
    with guard.attached(model):
        for target in (model, wrapped):
            with (
                pytest.raises(UserError, match="must carry no guard yet"),
                make_guard(SAE, [5]).attached(target),
            ):
                pytest.fail("attached")
        # The refusal leaves the first guard in place.
        assert model.model.layers[1]._forward_hooks
    with guard.attached(wrapped):
        pass


def test_decisions_need_a_forward_pass(model):
    with (
        make_guard(SAE).attached(model) as attachment,
        pytest.raises(UserError, match="after a forward pass"),
    ):
        _ = attachment.triggered


@pytest.mark.parametrize("attach_to", ["wrapper", "inner"])
@pytest.mark.parametrize("call", ["wrapper", "inner"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_peft_and_gradient_modes(model, attach_to, call, mode):
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    objects = {"wrapper": wrapped, "inner": model}
    guard, triggered = mixed_guard(model)
    everything = torch.ones_like(IDS, dtype=torch.bool)
    with torch.no_grad(), guard.attached(model):
        expected = model(IDS).logits
    with guard.attached(objects[attach_to]) as attachment, mode():
        logits = objects[call](input_ids=IDS, token_mask=everything).logits
    assert torch.equal(attachment.triggered, triggered)
    assert torch.equal(logits.detach(), expected)


def test_a_wrapper_that_calls_forward_directly_is_guarded(model):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

        def forward(self, *args, **kwargs):
            return self.module.forward(*args, **kwargs)

    guard, triggered = mixed_guard(model)
    for target in (model, Wrapper()):
        with guard.attached(target) as attachment:
            Wrapper()(IDS, token_mask=torch.ones_like(IDS, dtype=torch.bool))
            assert torch.equal(attachment.triggered, triggered)


def test_token_mask_replaces_the_rule_and_reaches_no_later_call(model):
    guard = make_guard(SAE, threshold=0.0)
    with guard.attached(model) as attachment:
        model(IDS, token_mask=torch.zeros_like(IDS, dtype=torch.bool))
        assert not attachment.triggered.any()
        with pytest.raises(TypeError):
            model(IDS, token_mask=torch.zeros_like(IDS, dtype=torch.bool), labels="nonsense")
        model(IDS)
        assert attachment.triggered.any()


def test_masks_must_fit(model):
    with make_guard(SAE).attached(model):
        with pytest.raises(UserError, match=r"`token_mask` must be boolean of shape \[6, 8\]"):
            model(IDS, token_mask=torch.ones(6, 7, dtype=torch.bool))
        with pytest.raises(UserError, match=r"`token_mask` must be boolean .* got torch.int64"):
            model(IDS, token_mask=torch.ones_like(IDS))


def test_embeddings_need_a_token_mask(model):
    guard, triggered = mixed_guard(model)
    embeds = model.model.embed_tokens(IDS)
    with guard.attached(model) as attachment:
        with pytest.raises(UserError, match="`token_mask` must be given with `inputs_embeds`"):
            model(inputs_embeds=embeds)
        model(inputs_embeds=embeds, token_mask=torch.ones_like(IDS, dtype=torch.bool))
        assert torch.equal(attachment.triggered, triggered)


def test_a_guarded_layer_does_not_run_alone(model):
    with (
        make_guard(SAE).attached(model),
        pytest.raises(UserError, match="must run inside its model's forward pass"),
    ):
        model.model.layers[1](
            torch.zeros(1, 2, 16),
            position_embeddings=(torch.ones(1, 2, 8), torch.zeros(1, 2, 8)),
        )


def test_a_skipped_hook_point_is_an_error(model):
    with make_guard(SAE, hook_point="model.layers.2").attached(model):
        model.config.num_hidden_layers = 2
        with pytest.raises(UserError, match="the model skipped it"):
            model(IDS)


def test_decoder_layers_that_return_tuples(model):
    guard, _ = mixed_guard(model)
    with guard.attached(model):
        expected = model(IDS).logits
    layer, following = model.model.layers[1], model.model.layers[2]
    layer.register_forward_hook(lambda _m, _a, output: (output, "extra"))
    following.register_forward_pre_hook(lambda _m, args: (args[0][0], *args[1:]))
    with guard.attached(model):
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompt_mask_scores_a_continuation(side, running):
    model = tiny_model(attn_implementation="sdpa").double()
    sae = standard_sae(dtype="float64")
    rows = [random_ids(1, 4 + n, seed=n)[0].tolist() for n in range(8)]
    prompt_lengths = [1, 2, 3, 1, 2, 3, 1, 2]
    batch = pad_sequences(rows, 0, UNCOUNTED, side)
    prompt_mask = torch.zeros_like(batch.token_mask)
    for row, length in enumerate(prompt_lengths):
        start = 0 if side == "right" else batch.input_ids.shape[1] - len(rows[row])
        prompt_mask[row, start : start + length] = True
    flipped = 0
    for threshold in (0.0, 0.3, 0.6):
        guard = make_guard(sae, threshold=threshold)
        continuation = "running" if running else "frozen"
        with guard.attached(model, "prompt", continuation) as attachment, torch.no_grad():
            logits = model(
                **batch.model_inputs(), token_mask=batch.token_mask, prompt_mask=prompt_mask
            ).logits
        for row, ids in enumerate(rows):
            expected = reference(model, sae, guard, ids, prompt_lengths[row], running)
            flipped += expected.triggered[0] != expected.triggered[-1]
            real = batch.attention_mask[row].bool()
            torch.testing.assert_close(logits[row][real], expected.logits, atol=1e-5, rtol=1e-5)
            assert attachment.triggered[row] == expected.triggered[-1]
            assert attachment.density[row] == expected.density
    assert bool(flipped) == running


def test_prompt_mask_must_be_a_beginning_and_is_ignored_by_sequence_decisions(model):
    behind = torch.zeros_like(IDS, dtype=torch.bool)
    behind[:, 4:] = True
    guard, triggered = mixed_guard(model)
    with (
        guard.attached(model, "prompt"),
        pytest.raises(UserError, match="`prompt_mask` must mark the beginning of each sequence"),
    ):
        model(IDS, prompt_mask=behind)
    with guard.attached(model) as attachment:
        model(IDS, prompt_mask=~behind)
        assert torch.equal(attachment.triggered, triggered)


def test_training_gradients_equal_an_explicit_reference():
    model = tiny_model(attn_implementation="sdpa").double()
    sae = standard_sae(dtype="float64")
    guard, _ = mixed_guard(model)
    guard = make_guard(sae, threshold=guard.threshold)
    with guard.attached(model) as attachment:
        loss = model(IDS, labels=IDS).loss
    parameters = dict(model.named_parameters())
    actual = torch.autograd.grad(loss, list(parameters.values()))

    def explicit(_module, _args, h):
        z = sae.encode(h)
        written = torch.zeros_like(z, dtype=torch.bool)
        selected = torch.tensor(guard.feature_ids)
        fires = (z[..., selected] > 0).any(-1) & attachment.triggered[:, None]
        for feature_id in guard.feature_ids:
            written[..., feature_id] = fires
        z_new = torch.where(written.detach(), torch.full_like(z, guard.clamp_value), z)
        return h + sae.decode(z_new) - sae.decode(z)

    handle = model.model.layers[1].register_forward_hook(explicit)
    expected = torch.autograd.grad(model(IDS, labels=IDS).loss, list(parameters.values()))
    handle.remove()
    for name, mine, theirs in zip(parameters, actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-5, msg=name)


def test_activation_checkpointing_changes_nothing(model):
    guard, triggered = mixed_guard(model)
    model.train()
    with guard.attached(model) as attachment:
        expected = model(IDS, labels=IDS).loss
        expected_grads = torch.autograd.grad(expected, list(model.parameters()))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(IDS, labels=IDS, use_cache=False).loss
        grads = torch.autograd.grad(loss, list(model.parameters()))
    assert torch.equal(attachment.triggered, triggered)
    assert torch.equal(loss, expected)
    for mine, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_autocast_does_not_reach_the_gate(model):
    guard, triggered = mixed_guard(model)
    with guard.attached(model) as attachment, torch.autocast("cpu", dtype=torch.bfloat16):
        model(IDS)
    # The residual stream itself changes under autocast, so only densities far off are compared.
    assert (attachment.triggered == triggered).float().mean() > 0.5
    assert attachment.density.dtype == torch.float64
