import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import (
    AbsTopKSAE,
    AbsTopKSAEConfig,
    TemporalSAE,
    TemporalSAEConfig,
    Transcoder,
    TranscoderConfig,
)

from dsg.errors import UserError
from dsg.sae.features import FeatureSlice, rebuild_features
from dsg.sae.loading import REFUSED, describe_sae, load_sae, slice_features
from tests.helpers import SAE_BUILDERS, identity_sae, jumprelu_sae, standard_sae

BUILDERS = {"standard": standard_sae, "jumprelu": jumprelu_sae}
NORMALIZATIONS = ["none", "layer_norm", "constant_norm_rescale"]


@pytest.mark.parametrize("architecture", SAE_BUILDERS)
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("rescale", [True, False])
def test_features_equal_the_full_sae(architecture, apply_b_dec_to_input, normalization, rescale):
    if architecture == "topk":
        extra = {"rescale_acts_by_decoder_norm": rescale}
    elif rescale:
        extra = {}
    else:
        return  # only a top-k SAE has this setting
    sae = SAE_BUILDERS[architecture](
        apply_b_dec_to_input=apply_b_dec_to_input,
        normalize_activations=normalization,
        dtype="float64",
        **extra,
    )
    ids = [7, 0, 23, 4]
    h = 3 * torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features = slice_features(sae, ids)
    z = sae.encode(h)
    reconstruction = sae.decode(z)
    assert (z[..., ids] > 0).any()
    torch.testing.assert_close(features.encode(h), z[..., ids], atol=1e-12, rtol=1e-9)
    assert (features.num_features, features.d_in) == (4, 16)

    # What the decoder makes of changed activations, by the SAE itself and from the features alone.
    changed = sae.encode(h).clone()  # encoding again: SAELens forgets the norms once it decodes
    changed[..., ids] = -7.0
    expected = sae.decode(changed) - reconstruction
    delta = (-7.0 - z[..., ids]) @ features.W_dec
    scale = features.output_scale(h)
    assert (scale is None) == (normalization == "none")
    torch.testing.assert_close(delta if scale is None else delta * scale, expected)


@pytest.mark.parametrize("architecture", SAE_BUILDERS)
def test_features_survive_saving(architecture):
    features = slice_features(SAE_BUILDERS[architecture](), [3, 1])
    encoder = json.loads(json.dumps(features.encoder))
    again = rebuild_features(features.state_dict(), encoder)
    h = torch.randn(4, 16)
    assert torch.equal(again.encode(h), features.encode(h))
    assert list(again.parameters()) == []
    assert list(features.parameters()) == []


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(sorted(SAE_BUILDERS)), st.sampled_from(NORMALIZATIONS))
def test_activations_do_not_depend_on_the_other_tokens(seed, architecture, normalization):
    sae = SAE_BUILDERS[architecture](seed=seed, normalize_activations=normalization)
    features = slice_features(sae, [3, 1, 20])
    h = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
    one_by_one = torch.stack([features.encode(row) for row in h])
    torch.testing.assert_close(features.encode(h), one_by_one, atol=1e-5, rtol=1e-5)
    shuffled = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        features.encode(h[shuffled]), one_by_one[shuffled], atol=1e-5, rtol=1e-5
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100), st.sampled_from(sorted(BUILDERS)))
def test_float32_slice_agrees_with_the_sae(seed, architecture):
    sae = BUILDERS[architecture](seed=seed)
    h = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
    ids = [3, 1, 20]
    torch.testing.assert_close(
        slice_features(sae, ids).encode(h), sae.encode(h)[..., ids], atol=1e-5, rtol=1e-5
    )


def test_activation_is_strictly_above_the_threshold():
    sae = identity_sae()
    features = FeatureSlice(
        feature_ids=torch.tensor([0, 1]),
        W_enc=sae.W_enc[:, :2],
        b_enc=torch.zeros(2),
        activation_threshold=torch.tensor([1.0, 0.0]),
        W_dec=sae.W_dec[:2],
    )
    h = torch.zeros(3, 16)
    h[:, :2] = torch.tensor([[1.0, 0.0], [1.5, 0.5], [-1.0, -1.0]])
    assert features.encode(h).tolist() == [[0.0, 0.0], [1.5, 0.5], [0.0, 0.0]]


def test_slice_has_buffers_only_and_does_not_share_the_sae():
    sae = standard_sae()
    features = slice_features(sae, [1, 2])
    assert list(features.parameters()) == []
    assert {name for name, _ in features.named_buffers()} == {
        "feature_ids",
        "W_enc",
        "b_enc",
        "activation_threshold",
        "magnitude_scale",
        "magnitude_bias",
        "W_dec",
    }
    before = features.W_dec.clone()
    sae.W_dec.data.zero_()
    assert torch.equal(features.W_dec, before)


def test_arithmetic_never_falls_below_float32():
    features = slice_features(standard_sae(), [1, 2])
    h = torch.randn(4, 16)
    exact = features.encode(h.bfloat16().float())
    assert torch.equal(features.to(torch.bfloat16).encode(h.bfloat16()), exact)
    assert features.half().W_enc.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(features.encode(h.bfloat16()), exact)
    assert features.encode(h.double()).dtype == torch.float64
    assert features.to("meta").W_enc.device.type == "meta"


def test_half_precision_sae_is_sliced_in_float32():
    assert slice_features(standard_sae(dtype="bfloat16"), [0]).W_enc.dtype == torch.float32


def test_encode_is_differentiable():
    sae = jumprelu_sae(dtype="float64")
    h = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    z = slice_features(sae, [0, 5]).encode(h)
    (gradient,) = torch.autograd.grad(z.sum(), h)
    expected = (z > 0).double() @ sae.W_enc[:, [0, 5]].T
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("ids", [[], [1, 1], [-1], [24]])
def test_bad_ids_are_refused(ids):
    with pytest.raises(UserError, match="`feature_ids` must be at least one id, unique"):
        slice_features(standard_sae(), ids)


def training_sae(name):
    import sae_lens

    return getattr(sae_lens, name)(getattr(sae_lens, f"{name}Config")(d_in=16, d_sae=24))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: AbsTopKSAE(AbsTopKSAEConfig(d_in=16, d_sae=24, k=2)),
            "'abstopk', which a guard cannot use because its activations can be negative",
        ),
        (
            lambda: TemporalSAE(
                TemporalSAEConfig(16, 24, n_heads=1, bottleneck_factor=1, kval_topk=2)
            ),
            "'temporal', which a guard cannot use because its activations depend on the other",
        ),
        (
            lambda: Transcoder(TranscoderConfig(16, 24, d_out=16, apply_b_dec_to_input=False)),
            "'transcoder', which a guard cannot use because it reads one place",
        ),
        (
            lambda: training_sae("BatchTopKTrainingSAE"),
            "'batchtopk', which .* save it for inference, which makes a JumpReLU SAE",
        ),
        (
            lambda: standard_sae(normalize_activations="covariance_whitening"),
            "got 'covariance_whitening', whose statistics are in no weight",
        ),
        (
            lambda: standard_sae(normalize_activations="expected_average_only_in"),
            "got 'expected_average_only_in', whose statistics are in no weight",
        ),
        (
            lambda: standard_sae(reshape_activations="hook_z"),
            "must read the residual stream through a ReLU, got reshape_activations 'hook_z'",
        ),
    ],
)
def test_unsupported_saes_are_refused_by_name_with_the_reason(make, reason):
    with pytest.raises(UserError, match=reason):
        slice_features(make(), [0])


def test_every_architecture_of_saelens_is_known():
    from sae_lens.registry import SAE_CLASS_REGISTRY

    assert set(SAE_CLASS_REGISTRY) <= {*SAE_BUILDERS, *REFUSED}


def test_batch_topk_saved_for_inference_is_sliced(tmp_path):
    trained = training_sae("BatchTopKTrainingSAE")
    trained.topk_threshold.fill_(0.4)
    trained.save_inference_model(tmp_path)
    sae = load_sae(str(tmp_path))
    assert sae.cfg.architecture() == "jumprelu"
    h = torch.randn(5, 16)
    torch.testing.assert_close(slice_features(sae, [0, 9]).encode(h), sae.encode(h)[..., [0, 9]])


def test_a_description_tells_saes_apart(tmp_path):
    sae = standard_sae()
    sae.save_model(tmp_path)
    loaded = describe_sae(load_sae(str(tmp_path)))
    assert loaded["sha256"] == describe_sae(sae)["sha256"] != describe_sae(standard_sae(seed=1))
    assert loaded["loaded_from"] == [str(tmp_path), None]
    assert (loaded["architecture"], loaded["d_sae"]) == ("standard", 24)


def test_mismatched_and_non_finite_tensors_are_refused():
    good = dict(slice_features(standard_sae(), [0, 1]).named_buffers())
    with pytest.raises(UserError, match=r"`b_enc` must have shape \(2,\) to fit `W_dec`"):
        FeatureSlice(**{**good, "b_enc": torch.zeros(3)})
    with pytest.raises(UserError, match="`W_enc` must be finite"):
        FeatureSlice(**{**good, "W_enc": torch.full((16, 2), torch.nan)})


@pytest.mark.parametrize("architecture", BUILDERS)
def test_load_sae_reads_a_saelens_folder(tmp_path, architecture):
    sae = BUILDERS[architecture]()
    sae.save_model(tmp_path)
    h = torch.randn(4, 16)
    assert torch.equal(load_sae(str(tmp_path)).encode(h), sae.encode(h))


def test_load_sae_reads_a_trained_saes_inference_folder(tmp_path):
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

    trained = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(d_in=16, d_sae=24))
    trained.save_inference_model(tmp_path)
    loaded = load_sae(str(tmp_path))
    assert loaded.cfg.architecture() == "jumprelu"
    h = 10 * torch.randn(4, 16)
    torch.testing.assert_close(
        slice_features(loaded, [0, 3]).encode(h), trained.encode(h)[..., [0, 3]]
    )


def test_load_sae_reads_half_precision_as_float32(tmp_path):
    standard_sae(dtype="bfloat16").save_model(tmp_path)
    assert load_sae(str(tmp_path)).W_enc.dtype == torch.float32


def write_gemma_scope(folder, sae, **changes):
    arrays = {
        name: getattr(sae, name).detach().numpy()
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    }
    np.savez(folder / "params.npz", **{k: v for k, v in {**arrays, **changes}.items() if len(v)})


def test_load_sae_reads_gemma_scope(tmp_path):
    sae = jumprelu_sae(apply_b_dec_to_input=False)
    write_gemma_scope(tmp_path, sae)
    loaded = load_sae(str(tmp_path))
    h = torch.randn(4, 16)
    z = torch.relu(h @ sae.W_enc + sae.b_enc) * ((h @ sae.W_enc + sae.b_enc) > sae.threshold)
    torch.testing.assert_close(loaded.encode(h), z)
    torch.testing.assert_close(loaded.decode(z), z @ sae.W_dec + sae.b_dec)


def test_incomplete_gemma_scope_is_refused(tmp_path):
    write_gemma_scope(tmp_path, jumprelu_sae(), threshold=np.zeros(0))
    with pytest.raises(UserError, match="misses \\['threshold'\\]"):
        load_sae(str(tmp_path))


def test_load_sae_refuses_what_holds_no_sae(tmp_path):
    with pytest.raises(UserError, match="found no loadable SAE at"):
        load_sae(str(tmp_path))
    with pytest.raises(UserError, match="a folder that holds an SAE, or a release given together"):
        load_sae(str(tmp_path / "missing"))


def test_unknown_release_and_network_failure_are_one_sentence(monkeypatch):
    with pytest.raises(UserError, match="'no-such-release' with id 'x'; check name"):
        load_sae("no-such-release", "x")
    from sae_lens import SAE

    def offline(*_args, **_kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(SAE, "from_pretrained", offline)
    with pytest.raises(UserError, match=r"check name, files and network \(no route to host\)"):
        load_sae("gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_142")
