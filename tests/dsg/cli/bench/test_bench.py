"""What the benchmark compares is right, and its numbers mean what they say."""

import time

import numpy as np
import pytest
import torch

from dsg.cli.bench import edit as edit_bench
from dsg.cli.bench.edit import (
    CLAMP_VALUE,
    THRESHOLD,
    dense_clamp,
    measure_edit,
    random_sae,
    sliced,
    triggered_input,
)
from dsg.cli.bench.layer import measure_layer, random_model
from dsg.cli.bench.selection import measure_early_stop, measure_memory_here, random_batches
from dsg.guard.edit import Clamp
from dsg.guard.gate import DensityGate
from dsg.guard.guard import Guard
from dsg.lm.hooks import hidden_states, resolve_hook_point
from dsg.sae.features import Features
from dsg.sae.loading import slice_features
from tests import helpers

IDS = [5, 2, 11]


def by_hand(sae, h, token_mask, ids, threshold, clamp_value):
    """The clamp in float64, one token and one feature at a time."""
    W_enc, b_enc, limits, W_dec = (
        getattr(sae, name).detach().double().numpy()
        for name in ("W_enc", "b_enc", "threshold", "W_dec")
    )
    edited = h.double().numpy().copy()
    for row in range(len(edited)):
        counted = [t for t in range(h.shape[1]) if token_mask[row, t]]
        acts = {}
        for t in counted:
            pre = {j: float(np.dot(edited[row, t], W_enc[:, j]) + b_enc[j]) for j in ids}
            acts[t] = {j: p if p > limits[j] and p > 0 else 0.0 for j, p in pre.items()}
        fired = [t for t in counted if any(acts[t].values())]
        if len(fired) / len(counted) > threshold:
            for t in fired:
                for j in ids:
                    edited[row, t] += (clamp_value - acts[t][j]) * W_dec[j]
    return torch.from_numpy(edited)


@pytest.fixture
def case():
    """Two sequences of which only the first has planted features; the first tokens do not count."""
    sae = random_sae(32, 256, seed=0)
    planted, token_mask = triggered_input(sae, IDS, num_tokens=24, seed=1)
    plain = torch.randn(planted.shape, generator=torch.Generator().manual_seed(2))
    return sae, torch.cat([planted, plain]), token_mask.expand(2, -1)


@pytest.mark.parametrize("subtract_b_dec", [False, True])
def test_the_dense_edit_is_the_clamp_by_hand(subtract_b_dec, case):
    _, h, token_mask = case
    sae = helpers.jumprelu_sae(32, 64, dtype="float64", apply_b_dec_to_input=subtract_b_dec)
    found = dense_clamp(sae, h.double(), token_mask, IDS, 0.5, -3.0)
    if subtract_b_dec:
        sae.b_enc.data -= sae.b_dec.data @ sae.W_enc.data
    wanted = by_hand(sae, h, token_mask, IDS, 0.5, -3.0)
    assert not torch.equal(wanted, h.double())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_both_edits_write_only_triggered_sequences(case):
    sae, h, token_mask = case
    wanted = by_hand(sae, h, token_mask, IDS, THRESHOLD, CLAMP_VALUE)
    assert (wanted[0] - h[0]).abs().max() > 1.0
    assert torch.equal(wanted[1], h[1].double())
    dense = dense_clamp(sae, h, token_mask, IDS, THRESHOLD, CLAMP_VALUE)
    ours = sliced(slice_features(sae, IDS), h, token_mask)
    torch.testing.assert_close(dense.double(), wanted, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-3)
    assert torch.equal(ours[1], h[1])


def test_what_is_timed_is_what_an_attached_guard_does():
    model = helpers.tiny_model()
    input_ids = helpers.random_ids(1, 12)
    outputs = []
    features = slice_features(helpers.standard_sae(), IDS)
    guard = Guard(
        features,
        hook_point=helpers.HOOK_POINT,
        uncounted_ids=[],
        pad_id=None,
        gate=DensityGate(THRESHOLD),
        edit=Clamp(CLAMP_VALUE),
    )
    handle = resolve_hook_point(model, helpers.HOOK_POINT).register_forward_hook(
        lambda *call: outputs.append(hidden_states(call[2]))
    )
    with torch.no_grad():
        model(input_ids)
        with guard.attached(model) as attachment:
            model(input_ids)
    handle.remove()
    assert attachment.triggered.all()
    plain, guarded = outputs
    assert not torch.equal(plain, guarded)
    assert torch.equal(sliced(features, plain, torch.ones_like(input_ids).bool()), guarded)


def test_the_random_sae_is_as_sparse_as_gemma_scope():
    sae = random_sae(256, 4096, seed=0)
    h = edit_bench._RESIDUAL_STD * torch.randn(64, 256)
    share = (sae.encode(h) > 0).double().mean().item()
    assert 80 / 16384 < share < 125 / 16384


def test_the_edits_are_compared_and_timed():
    sae = random_sae(64, 8192, seed=0)
    cost = measure_edit(sae, num_features=4, num_tokens=128, repeats=3, seed=0)
    assert cost.density > THRESHOLD
    assert cost.ratio == cost.dense_seconds / cost.sliced_seconds
    assert 3 < cost.lowest_ratio <= cost.ratio <= cost.highest_ratio
    # Both outputs reach some hundreds, of which a float32 keeps about seven digits.
    assert 0 < cost.difference_in_eps < 100
    assert max(cost.dense_error, cost.sliced_error, cost.difference) < 1e-2


def test_a_wrong_edit_shows_in_the_difference(monkeypatch):
    monkeypatch.setattr(edit_bench, "sliced", lambda _features, h, _mask: h)
    cost = measure_edit(random_sae(32, 256, seed=0), 4, num_tokens=32, repeats=1, seed=0)
    assert cost.difference_in_eps > 1e5
    assert cost.sliced_error > 10
    assert cost.dense_error < 1e-2


def test_a_guard_leaves_untriggered_passes_alone_and_the_model_clean():
    model = random_model(32, seed=0)
    share = measure_layer(model, num_features=4, num_tokens=32, repeats=2, seed=0)
    assert share.untriggered_identical
    assert share.triggered_differs
    assert min(share.untriggered_share, share.triggered_share, share.layer_seconds) > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_share_holds_the_guards_time_and_not_the_layers(monkeypatch):
    encode = Features.encode

    def slow(self, h):
        time.sleep(0.05)
        return encode(self, h)

    monkeypatch.setattr(Features, "encode", slow)
    share = measure_layer(random_model(32, seed=0), 4, num_tokens=32, repeats=3, seed=0)
    assert share.layer_seconds < 0.05
    assert share.untriggered_share > 1
    assert share.triggered_share > 1


def test_the_layer_has_gemma_2_2bs_shapes():
    with torch.device("meta"):
        layer = random_model(2304, seed=0).model.layers[0]
    assert tuple(layer.self_attn.q_proj.weight.shape) == (8 * 256, 2304)
    assert tuple(layer.self_attn.k_proj.weight.shape) == (4 * 256, 2304)
    assert tuple(layer.mlp.down_proj.weight.shape) == (2304, 9216)


def test_text_comes_in_batches_that_add_up():
    batches = list(random_batches(300, (2, 64), seed=0))
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(2, 64), (2, 64), (1, 44)]
    assert sum(int(batch.token_mask.sum()) for batch in batches) == 300
    assert not torch.equal(batches[0].input_ids, batches[1].input_ids)


def test_selection_counts_the_text_it_was_given():
    memory = measure_memory_here(num_tokens=300, d_sae=128, seed=0)
    assert (memory.num_tokens, memory.d_sae) == (300, 128)
    assert memory.all_activations_bytes == 300 * 128 * 4
    assert memory.increase_bytes >= 0
    assert memory.seconds > 0


def test_stopping_early_reads_the_same_faster():
    stop = measure_early_stop(repeats=3, seed=0)
    assert stop.identical
    assert stop.ratio > 1
    assert stop.stopped_tokens_per_second / stop.whole_tokens_per_second == pytest.approx(
        stop.ratio
    )
