"""Hook points and guards on every supported model family."""

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from dsg.errors import UserError
from dsg.lm.hooks import read_activations, resolve_hook_point, unwrap
from dsg.lm.tokens import pad_sequences
from tests.families import FAMILIES, WINDOW, build, build_multimodal, greedy, reference, with_lora
from tests.guard_reference import UNCOUNTED, make_guard
from tests.helpers import HOOK_POINT, random_ids, standard_sae

IDS = random_ids(6, 9)
SAE = standard_sae()
SAE64 = standard_sae(dtype="float64")
LENGTHS = (2, 9, 5, 7, 3)
ROWS = [random_ids(1, length, seed=40 + length)[0].tolist() for length in LENGTHS]

pytestmark = pytest.mark.filterwarnings("ignore:`use_cache=True` is incompatible")


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name, scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def shared(family):
    """One model per family, for tests that leave it as it was."""
    return build(family)


def mixed_guard(model, sae=SAE, rows=None):
    """A guard that triggers on some rows but not on all, and which those are."""
    batch = pad_sequences(IDS.tolist() if rows is None else rows, 0, UNCOUNTED)
    with torch.no_grad():
        active = sae.encode(read_activations(model, HOOK_POINT, batch))[batch.token_mask] > 0
    # Features that fire on some tokens only, whatever the family.
    features = (active.double().mean(0) - 0.3).abs().topk(2, largest=False).indices.tolist()
    guard = make_guard(sae, features)
    densities = guard.density(model, batch.input_ids, batch.attention_mask)
    levels = densities.unique()
    assert len(levels) > 1
    guard = guard.replace(threshold=levels[(len(levels) - 1) // 2].item())
    return guard, densities > guard.threshold


def positions(mask):
    """The positions that `generate` gives padded rows."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def gradients(model, **options):
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, **options).loss.backward()
    return {name: p.grad.clone() for name, p in unwrap(model).named_parameters() if p.requires_grad}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_names_of_a_layer_lead_to_the_same_module(family, shared):
    layer = family.layer(shared, 1)
    for name in (HOOK_POINT, "blocks.2.hook_resid_pre", family.layer_path(1)):
        assert resolve_hook_point(shared, name) is layer
    for missing in ("blocks.3.hook_resid_post", family.layer_path(3)):
        with pytest.raises(UserError, match=f"`hook_point` must name .* got {missing!r}"):
            resolve_hook_point(shared, missing)


def test_read_activations_are_hidden_states(shared):
    batch = pad_sequences(ROWS, 0, UNCOUNTED)
    with torch.no_grad():
        hidden = shared(**batch.model_inputs(), output_hidden_states=True).hidden_states
    # hidden_states[0] is the embedding, and the last one has gone through the final norm.
    assert torch.equal(read_activations(shared, HOOK_POINT, batch), hidden[2])


def test_padding_does_not_change_what_is_read(shared):
    left, right = (pad_sequences(ROWS, 0, UNCOUNTED, side) for side in ("left", "right"))
    read = [read_activations(shared, HOOK_POINT, batch) for batch in (left, right)]
    for row, ids in enumerate(ROWS):
        alone = read_activations(shared, HOOK_POINT, pad_sequences([ids], 0, UNCOUNTED))[0]
        for h, batch in zip(read, (left, right), strict=True):
            real = batch.attention_mask[row].bool()
            torch.testing.assert_close(h[row][real], alone, atol=1e-5, rtol=1e-5)


def test_guarded_logits_are_those_of_the_reference(family):
    model = build(family, torch.float64)
    guard, triggered = mixed_guard(model, SAE64)
    plain = model(IDS).logits
    with guard.attached(model) as attachment:
        logits = model(IDS).logits
    assert torch.equal(attachment.triggered, triggered)
    for row, ids in enumerate(IDS.tolist()):
        expected = reference(family.layer(model, 1), model, SAE64, guard, ids)
        assert expected.triggered[-1] == triggered[row]
        assert expected.density == attachment.density[row]
        torch.testing.assert_close(logits[row], expected.logits, atol=1e-6, rtol=1e-6)
        assert torch.equal(logits[row], plain[row]) != triggered[row]


def test_an_untriggered_guard_changes_no_bit(shared):
    plain = shared(IDS).logits
    with make_guard(SAE, threshold=1.0).attached(shared) as attachment:
        assert torch.equal(shared(IDS).logits, plain)
        assert (attachment.density > 0).any()


def test_detaching_restores_the_model_also_after_an_exception(shared):
    plain = shared(IDS).logits
    guard, _ = mixed_guard(shared)

    def fail_under_guard():
        with guard.attached(shared):
            assert not torch.equal(shared(IDS).logits, plain)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail_under_guard()
    assert torch.equal(shared(IDS).logits, plain)


def test_attaching_twice_or_an_sae_of_another_width_is_refused(shared):
    plain = shared(IDS).logits
    with pytest.raises(UserError, match="width 16, got 8"):
        make_guard(standard_sae(d_in=8)).attached(shared).__enter__()
    guard, _ = mixed_guard(shared)
    with guard.attached(shared), pytest.raises(UserError, match="must carry no guard"):
        guard.attached(shared).__enter__()
    assert torch.equal(shared(IDS).logits, plain)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_decisions_nor_logits(shared, side):
    guard, triggered = mixed_guard(shared, rows=ROWS)
    batch = pad_sequences(ROWS, 0, UNCOUNTED, side)
    padded = guard.density(shared, batch.input_ids, batch.attention_mask)
    assert torch.equal(padded > guard.threshold, triggered)
    with guard.attached(shared) as attachment, torch.no_grad():
        logits = shared(**batch.model_inputs(), position_ids=positions(batch.attention_mask)).logits
        assert torch.equal(attachment.triggered, triggered)
        assert torch.equal(attachment.density, padded)
        for row, ids in enumerate(ROWS):
            real = batch.attention_mask[row].bool()
            alone = shared(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(logits[row][real], alone, atol=1e-5, rtol=1e-5)


def test_generation_with_a_cache_equals_decoding_without_one(family):
    model = build(family)
    guard, _ = mixed_guard(model, SAE, ROWS)
    batch = pad_sequences(ROWS, 0, UNCOUNTED, "left")
    # Some prompts are longer than the sliding window, and all rows together outgrow it.
    assert min(LENGTHS) < WINDOW < max(LENGTHS)
    new_tokens, model.generation_config.eos_token_id = WINDOW, None
    with guard.attached(model, decision="prompt") as attachment:
        out = model.generate(**batch.model_inputs(), max_new_tokens=new_tokens)
    layer, decisions = family.layer(model, 1), set()
    for row, ids in enumerate(ROWS):
        new = out[row, batch.input_ids.shape[1] :].tolist()
        assert new == greedy(layer, model, SAE, guard, ids, new_tokens)
        # The last generated token never enters the model.
        expected = reference(layer, model, SAE, guard, ids + new[:-1], len(ids))
        assert attachment.density[row] == expected.density
        assert attachment.triggered[row] == expected.triggered[-1]
        decisions.add((expected.triggered[0], expected.triggered[-1]))
    assert len(decisions) > 1


def test_scoring_in_steps_equals_scoring_at_once(family):
    model = build(family, torch.float64)
    guard, _ = mixed_guard(model, SAE64)
    prompt_mask = torch.arange(9)[None].expand_as(IDS) < 4
    with guard.attached(model, decision="prompt") as attachment, torch.no_grad():
        at_once = model(IDS, prompt_mask=prompt_mask).logits
        triggered = attachment.triggered
        first = model(IDS[:, :4], use_cache=True)
        # Blocks of two and three tokens cross the edge of the sliding window.
        second = model(IDS[:, 4:6], past_key_values=first.past_key_values, use_cache=True)
        third = model(IDS[:, 6:], past_key_values=second.past_key_values, use_cache=True)
    steps = torch.cat([first.logits, second.logits, third.logits], 1)
    torch.testing.assert_close(steps, at_once, atol=1e-6, rtol=1e-6)
    assert torch.equal(attachment.triggered, triggered)


def test_layers_that_return_tuples(family):
    model = build(family)
    guard, _ = mixed_guard(model)
    with guard.attached(model):
        expected = model(IDS).logits
    batch = pad_sequences(IDS.tolist(), 0, UNCOUNTED)
    h = read_activations(model, HOOK_POINT, batch)
    family.layer(model, 1).register_forward_hook(lambda _m, _a, output: (output, "extra"))
    family.layer(model, 2).register_forward_pre_hook(lambda _m, args: (args[0][0], *args[1:]))
    with guard.attached(model):
        assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(read_activations(model, HOOK_POINT, batch), h)


def test_lora(family):
    model = build(family)
    plain = model(IDS).logits
    wrapped = with_lora(family, model)
    adapted = model(IDS).logits
    assert not torch.allclose(adapted, plain, atol=1e-3)
    assert torch.equal(wrapped(input_ids=IDS).logits, adapted)
    assert resolve_hook_point(wrapped, family.layer_path(1)) is family.layer(model, 1)
    guard, triggered = mixed_guard(wrapped)
    with guard.attached(model):
        expected = model(IDS).logits
        generated = model.generate(IDS, max_new_tokens=4)
    assert torch.equal(expected[~triggered], adapted[~triggered])
    assert not torch.equal(expected[triggered], adapted[triggered])
    with guard.attached(wrapped) as attachment:
        assert torch.equal(wrapped(input_ids=IDS).logits, expected)
        assert torch.equal(attachment.triggered, triggered)
        assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(wrapped.generate(input_ids=IDS, max_new_tokens=4), generated)
    assert torch.equal(wrapped(input_ids=IDS).logits, adapted)


@pytest.mark.parametrize("adapters", [False, True])
def test_gradient_checkpointing_changes_no_gradient(family, adapters):
    model = with_lora(family, build(family)) if adapters else build(family)
    guard, triggered = mixed_guard(model)
    model.train()
    unguarded = gradients(model, use_cache=False)
    with guard.attached(model) as attachment:
        expected = gradients(model, use_cache=False)
        runs = []
        target = family.layer(unwrap(model), 2).mlp
        handle = target.register_forward_pre_hook(lambda *_: runs.append(1))
        model.gradient_checkpointing_enable()
        actual = gradients(model, use_cache=False)
        handle.remove()
    assert len(runs) == 2  # Forward, and once more for the backward pass.
    assert torch.equal(attachment.triggered, triggered)
    assert_same(actual, expected)
    assert any(not torch.allclose(unguarded[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    store = distributed.FileStore(str(tmp_path_factory.mktemp("ddp") / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel(family):
    model = build(family)
    guard, triggered = mixed_guard(model)
    with guard.attached(model):
        logits = model(IDS).logits
        expected = gradients(model)
    wrapped = DistributedDataParallel(model)
    assert resolve_hook_point(wrapped, HOOK_POINT) is family.layer(model, 1)
    counted = torch.ones_like(IDS, dtype=torch.bool)
    with guard.attached(wrapped) as attachment:
        assert torch.equal(wrapped(input_ids=IDS, token_mask=counted).logits, logits)
        assert torch.equal(attachment.triggered, triggered)
        actual = gradients(wrapped)
    assert_same(actual, expected)
    with guard.attached(model) as attachment:
        assert torch.equal(wrapped(input_ids=IDS).logits, logits)
        assert torch.equal(attachment.triggered, triggered)


def test_the_text_part_of_a_multimodal_model():
    model = build_multimodal()
    layer = model.model.language_model.layers[1]
    assert resolve_hook_point(model, HOOK_POINT) is layer
    assert resolve_hook_point(model, "model.language_model.layers.1") is layer
    ids = IDS.clamp(max=28)
    guard, triggered = mixed_guard(model, rows=ids.tolist())
    counted = torch.ones_like(ids, dtype=torch.bool)
    with guard.attached(model) as attachment, torch.no_grad():
        logits = model(input_ids=ids, token_mask=counted).logits
    assert torch.equal(attachment.triggered, triggered)
    for row in range(len(ids)):
        expected = reference(layer, model, SAE, guard, ids[row].tolist())
        torch.testing.assert_close(logits[row], expected.logits, atol=1e-4, rtol=1e-4)
