import pytest
import torch

from dsg.guard.edit import Clamp, Refusal, Write, apply_writes
from dsg.sae.loading import slice_features
from tests.guard_reference import FEATURES, LAYER, make_guard
from tests.helpers import identity_sae, jumprelu_sae, random_ids, standard_sae, tiny_model


def test_entries_by_scope():
    acts = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]])
    here = torch.tensor([[True, True, False]])
    assert Clamp(-1.0, "all").entries(acts, here).tolist() == [
        [[True, True], [False] * 2, [False] * 2]
    ]
    assert Clamp(-1.0, "active").entries(acts, here).tolist() == [
        [[True, False], [False] * 2, [False] * 2]
    ]


def test_a_refusal_writes_the_last_feature_where_another_is_above_the_limit():
    acts = torch.tensor([[[1.0, 0.0, 0.0], [0.3, 0.2, 9.0], [0.0, 2.0, 0.0]]])
    here = torch.tensor([[True, True, False]])
    entries = Refusal(-1.0, trigger_limit=0.5).entries(acts, here)
    assert entries.tolist() == [[[False, False, True], [False] * 3, [False] * 3]]


def test_edit_equals_full_decode_in_float64():
    sae = standard_sae(dtype="float64")
    features = slice_features(sae, [3, 0, 7])
    h = torch.randn(2, 5, 16, dtype=torch.float64)
    z = sae.encode(h)
    entries = Clamp(-1.0, "all").entries(z[..., [3, 0, 7]], torch.ones(2, 5, dtype=torch.bool))
    z_new = z.clone()
    z_new[..., [3, 0, 7]] = torch.where(entries, -50.0, z[..., [3, 0, 7]])
    expected = h + sae.decode(z_new) - sae.decode(z)
    actual = apply_writes(h, [Write(features, features.encode(h), entries, -50.0)])
    torch.testing.assert_close(actual, expected)
    untouched = ~entries.any(-1)
    assert untouched.any()
    assert torch.equal(actual[untouched], h[untouched])


def test_nothing_to_write_returns_the_very_tensor():
    features = slice_features(standard_sae(), [0])
    h = torch.randn(1, 2, 16)
    entries = torch.zeros(1, 2, 1, dtype=torch.bool)
    assert apply_writes(h, [Write(features, features.encode(h), entries, -5.0)]) is h
    assert apply_writes(h, []) is h


def test_shared_feature_is_written_once_by_the_oldest_that_writes_there():
    features = slice_features(identity_sae(), [0, 1]), slice_features(identity_sae(), [1, 2])
    h = torch.zeros(1, 2, 16)
    h[0, :, :3] = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    writes = [
        Write(
            part, z := part.encode(h), Clamp(-1.0, "all").entries(z, torch.ones(1, 2).bool()), value
        )
        for part, value in zip(features, (-10.0, -20.0), strict=True)
    ]
    edited = apply_writes(h, writes)
    # At the second token the older guard has nothing active, so the younger writes both.
    assert edited[0, :, :3].tolist() == [[-10.0, -10.0, -20.0], [0.0, -20.0, -20.0]]


def test_sum_is_formed_in_float32_and_cast_back():
    features = slice_features(standard_sae(), [3, 0])
    h = torch.randn(1, 4, 16).bfloat16()
    z = features.encode(h)
    entries = Clamp(-1.0, "all").entries(z, torch.ones(1, 4).bool())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        edited = apply_writes(h, [Write(features, z, entries, -500.0)])
    delta = torch.where(entries, -500.0 - z, 0.0).double() @ features.W_dec.double()
    expected = torch.where(entries.any(-1, keepdim=True), h.double() + delta, h.double())
    assert edited.dtype == torch.bfloat16
    # Half a unit in the last place of bfloat16, plus float32 rounding.
    torch.testing.assert_close(edited.double(), expected, rtol=2**-8, atol=1e-2)


def test_gradients_flow_through_the_delta():
    sae = standard_sae(dtype="float64")
    features = slice_features(sae, [3, 0, 7])
    weights = torch.randn(1, 4, 16, dtype=torch.float64)
    h = torch.randn(1, 4, 16, dtype=torch.float64, requires_grad=True)
    z = features.encode(h)
    entries = Clamp(-1.0, "active").entries(z, torch.ones(1, 4).bool()).detach()
    edited = apply_writes(h, [Write(features, z, entries, -50.0)])
    (actual,) = torch.autograd.grad((edited * weights).sum(), h)
    # z' is a constant where it is written, so only -z = -relu(h W + b) depends on h.
    back = (weights @ features.W_dec.T) * entries
    torch.testing.assert_close(actual, weights - back @ features.W_enc.T)


@pytest.mark.parametrize("normalization", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("unit", ["activation", "residual_norm"])
def test_what_is_written_by_hand_in_either_unit(normalization, unit):
    sae = jumprelu_sae(dtype="float64", normalize_activations=normalization)
    model = tiny_model().double()
    guard = make_guard(sae, threshold=0.0, value=-0.5, unit=unit, residual_norm=7.0 * len(FEATURES))
    layer, ids, outputs = model.model.layers[LAYER], random_ids(2, 6), []
    layer.register_forward_hook(lambda _m, _a, h: outputs.extend(h.flatten(0, 1)))
    with torch.no_grad():
        model(ids)
        with guard.attached(model):
            model(ids)
    before, after = outputs[:12], outputs[12:]
    sae.requires_grad_(False)
    features, written = slice_features(sae, FEATURES), 0
    for h, edited in zip(before, after, strict=True):
        x, scale = h, 1.0
        if normalization == "layer_norm":
            scale = h.std().item()
            x = (h - h.mean()) / (scale + 1e-5)
        elif normalization == "constant_norm_rescale":
            scale = (h @ h).sqrt().item() / 4.0  # the root of 16 channels
            x = h / scale
        pre = [
            float((x - sae.b_dec * sae.cfg.apply_b_dec_to_input) @ sae.W_enc[:, j] + sae.b_enc[j])
            for j in FEATURES
        ]
        z = [p * (p > sae.threshold[j].item()) for p, j in zip(pre, FEATURES, strict=True)]
        torch.testing.assert_close(features.encode(h), torch.tensor(z, dtype=torch.float64))
        # What the decoder row of a written feature is multiplied by in the residual stream.
        wanted = -0.5 * 21.0 if unit == "residual_norm" else -0.5 * scale
        expected = h.clone()
        if max(z) > 0:
            written += 1
            for j, activation in zip(FEATURES, z, strict=True):
                expected += (wanted - activation * scale) * sae.W_dec[j]
        torch.testing.assert_close(edited, expected)
    assert written > 3
