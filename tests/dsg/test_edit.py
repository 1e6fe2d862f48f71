import torch

from dsg.edit import Clamp, apply_clamps, clamp_entries
from dsg.sae import slice_features
from tests.helpers import identity_sae, standard_sae


def test_entries_by_scope():
    acts = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]])
    here = torch.tensor([[True, True, False]])
    assert clamp_entries(acts, here, "all").tolist() == [[[True, True], [False] * 2, [False] * 2]]
    assert clamp_entries(acts, here, "active").tolist() == [
        [[True, False], [False] * 2, [False] * 2]
    ]


def test_edit_equals_full_decode_in_float64():
    sae = standard_sae(dtype="float64")
    features = slice_features(sae, [3, 0, 7])
    h = torch.randn(2, 5, 16, dtype=torch.float64)
    z = sae.encode(h)
    entries = clamp_entries(z[..., [3, 0, 7]], torch.ones(2, 5, dtype=torch.bool), "all")
    z_new = z.clone()
    z_new[..., [3, 0, 7]] = torch.where(entries, -50.0, z[..., [3, 0, 7]])
    expected = h + sae.decode(z_new) - sae.decode(z)
    actual = apply_clamps(h, [Clamp(features, features.encode(h), entries, -50.0)])
    torch.testing.assert_close(actual, expected)
    untouched = ~entries.any(-1)
    assert untouched.any()
    assert torch.equal(actual[untouched], h[untouched])


def test_nothing_to_write_returns_the_very_tensor():
    features = slice_features(standard_sae(), [0])
    h = torch.randn(1, 2, 16)
    entries = torch.zeros(1, 2, 1, dtype=torch.bool)
    assert apply_clamps(h, [Clamp(features, features.encode(h), entries, -5.0)]) is h
    assert apply_clamps(h, []) is h


def test_shared_feature_is_written_once_by_the_oldest_that_writes_there():
    features = slice_features(identity_sae(), [0, 1]), slice_features(identity_sae(), [1, 2])
    h = torch.zeros(1, 2, 16)
    h[0, :, :3] = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    clamps = [
        Clamp(part, z := part.encode(h), clamp_entries(z, torch.ones(1, 2).bool(), "all"), value)
        for part, value in zip(features, (-10.0, -20.0), strict=True)
    ]
    edited = apply_clamps(h, clamps)
    # At the second token the older guard has nothing active, so the younger writes both.
    assert edited[0, :, :3].tolist() == [[-10.0, -10.0, -20.0], [0.0, -20.0, -20.0]]


def test_sum_is_formed_in_float32_and_cast_back():
    features = slice_features(standard_sae(), [3, 0])
    h = torch.randn(1, 4, 16).bfloat16()
    z = features.encode(h)
    entries = clamp_entries(z, torch.ones(1, 4).bool(), "all")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        edited = apply_clamps(h, [Clamp(features, z, entries, -500.0)])
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
    entries = clamp_entries(z, torch.ones(1, 4).bool(), "active").detach()
    edited = apply_clamps(h, [Clamp(features, z, entries, -50.0)])
    (actual,) = torch.autograd.grad((edited * weights).sum(), h)
    # z' is a constant where it is written, so only -z = -relu(h W + b) depends on h.
    back = (weights @ features.W_dec.T) * entries
    torch.testing.assert_close(actual, weights - back @ features.W_enc.T)
