"""Measures of fit against float64 brute force on unpadded sequences and against sums by hand."""

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from sae_lens import SAE

from dsg.errors import UserError
from dsg.lm.tokens import pad_sequences
from dsg.sae import fit as check
from dsg.sae.fit import Fit, check_fit, verdict
from dsg.sae.splicing import SpliceSums
from tests.helpers import (
    D_MODEL,
    HOOK_POINT,
    VOCAB_SIZE,
    jumprelu_sae,
    random_ids,
    standard_sae,
)

UNCOUNTED = [0, 1, 2]
LAST = "blocks.2.hook_resid_post"
SEQUENCES = [
    [2, *row[:length].tolist()]
    for row, length in zip(random_ids(5, 12), (12, 3, 7, 5, 9), strict=True)
]


def batch_of(sequences, side: Literal["left", "right"] = "right"):
    return pad_sequences(sequences, 0, UNCOUNTED, side)


def signed_identity_sae(**config):
    """Features j and j + d_in are the positive and the negative part of coordinate j."""
    sae = standard_sae(d_sae=2 * D_MODEL, **config)
    both = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
    sae.W_enc.data, sae.W_dec.data = both.T.clone(), both.clone()
    sae.b_enc.data.zero_()
    sae.b_dec.data.zero_()
    return sae


def saelens_sae(architecture, **config):
    """A random SAE of any architecture of SAELens."""
    from sae_lens.registry import get_sae_class

    sae_class, config_class = get_sae_class(architecture)
    sae = sae_class(config_class(d_in=D_MODEL, d_sae=24, **config))
    generator = torch.Generator().manual_seed(5)
    for weight in sae.parameters():
        weight.data = 0.4 * torch.randn(weight.shape, generator=generator)
    return sae


def hidden(model, ids, layer=1):
    """Output of a decoder layer for one unpadded sequence, by a hook of the test's own."""
    seen = []
    handle = model.model.layers[layer].register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0][0]


def brute_force_loss(model, edit, layer=1):
    """Mean next-token loss after counted tokens, whose activations `edit` replaces."""
    losses = []
    for ids in SEQUENCES:

        def hook(_module, _args, output):
            return torch.cat([output[:, :1], edit(output)[:, 1:]], dim=1)  # bos stays

        handle = model.model.layers[layer].register_forward_hook(hook)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        handle.remove()
        log_probs = logits - logits.logsumexp(-1, keepdim=True)
        losses += [-log_probs[i, ids[i + 1]].item() for i in range(1, len(ids) - 1)]
    return sum(losses) / len(losses)


def test_identity_loses_nothing(model):
    fit = check_fit(model, signed_identity_sae(), HOOK_POINT, [batch_of(SEQUENCES)])
    assert fit.fvu == pytest.approx(0, abs=1e-12)
    assert fit.loss_added == 0.0
    assert fit.l0 == D_MODEL  # each coordinate is either positive or negative
    assert fit.num_dead == 0
    assert (fit.d_in, fit.d_sae) == (D_MODEL, 2 * D_MODEL)
    assert fit.num_tokens == 12 + 3 + 7 + 5 + 9
    assert fit.num_predictions == fit.num_tokens - 5


ARCHITECTURES = {
    "standard": lambda: standard_sae(),
    "jumprelu": lambda: jumprelu_sae(),
    "b_dec not subtracted": lambda: standard_sae(apply_b_dec_to_input=False),
    "layer_norm": lambda: standard_sae(normalize_activations="layer_norm"),
    "constant_norm_rescale": lambda: standard_sae(normalize_activations="constant_norm_rescale"),
    "gated": lambda: saelens_sae("gated"),
    "topk": lambda: saelens_sae("topk", k=4, rescale_acts_by_decoder_norm=True),
    "abstopk": lambda: saelens_sae("abstopk", k=4),
    "matching_pursuit": lambda: saelens_sae("matching_pursuit", max_iterations=6),
    "temporal": lambda: saelens_sae("temporal", n_heads=2, n_attn_layers=1, bottleneck_factor=1),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_brute_force_per_sequence(model, name):
    sae: SAE = ARCHITECTURES[name]()
    fit = check_fit(model, sae, HOOK_POINT, [batch_of(SEQUENCES[:2]), batch_of(SEQUENCES[2:])])

    h, sae_out, acts = [], [], []
    for ids in SEQUENCES:
        one = hidden(model, ids)
        with torch.no_grad():
            h.append(one[1:].double())
            sae_out.append(sae(one[None])[0, 1:].double())
            acts.append(sae.encode(one[None])[0, 1:])
    h, sae_out, acts = torch.cat(h), torch.cat(sae_out), torch.cat(acts)
    fvu = ((h - sae_out) ** 2).sum() / ((h - h.mean(0)) ** 2).sum()
    assert fit.fvu == pytest.approx(fvu.item(), rel=1e-5)
    assert fit.l0 == pytest.approx((acts != 0).sum().item() / 36)
    assert fit.num_dead == int((acts == 0).all(0).sum())
    assert fit.mean_residual_norm == pytest.approx(h.norm(dim=1).mean().item(), rel=1e-6)
    with torch.no_grad():
        plain = brute_force_loss(model, lambda h: h)
        spliced = brute_force_loss(model, lambda h: sae(h))
    assert fit.loss == pytest.approx(plain, abs=1e-5)
    assert fit.loss_added == pytest.approx(spliced - plain, abs=2e-5)
    assert abs(fit.loss_added) > 1e-3
    ablated = brute_force_loss(model, torch.zeros_like)
    assert fit.ablation_loss_added == pytest.approx(ablated - plain, abs=2e-5)


def test_zeros_after_the_last_layer_predict_uniformly(model):
    fit = check_fit(model, standard_sae(), LAST, [batch_of(SEQUENCES)])
    # RMSNorm of zeros is zero, and so are the logits.
    assert fit.loss + fit.ablation_loss_added == pytest.approx(math.log(VOCAB_SIZE), abs=1e-5)


def test_a_silent_sae_writes_its_bias(model):
    sae = standard_sae()
    sae.b_enc.data.fill_(-1e4)
    fit = check_fit(model, sae, LAST, [batch_of(SEQUENCES)])
    assert (fit.l0, fit.num_dead, fit.dead_share, fit.clamp_ratio) == (0.0, 24, 1.0, None)
    bias = sae.b_dec.detach().double()
    weight = model.model.norm.weight.double() * bias / (bias.square().mean() + 1e-6).sqrt()
    logits = model.lm_head.weight.detach().double() @ weight
    predicted = [token for ids in SEQUENCES for token in ids[2:]]
    expected = logits.logsumexp(0) - logits[predicted].mean()
    assert fit.loss + fit.loss_added == pytest.approx(expected.item(), abs=1e-4)
    assert "Only 0 features are active per token" in " ".join(verdict(fit).reasons)


# A temporal SAE sees the other tokens of the sequence, padding too if it were given any.
@pytest.mark.parametrize("name", ["jumprelu", "temporal"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batches_change_nothing(model, side, name):
    sae = ARCHITECTURES[name]()
    together = check_fit(model, sae, HOOK_POINT, [batch_of(SEQUENCES, side)])
    alone = check_fit(model, sae, HOOK_POINT, [batch_of([ids]) for ids in SEQUENCES])
    for measure in ("num_tokens", "num_predictions", "num_dead", "l0"):
        assert getattr(together, measure) == getattr(alone, measure)
    for measure in ("fvu", "loss", "loss_added", "ablation_loss_added", "mean_residual_norm"):
        expected = pytest.approx(getattr(alone, measure), rel=1e-5, abs=1e-5)
        assert getattr(together, measure) == expected


def test_a_far_mean_does_not_hide_the_variation():
    # In float64 too the difference of two sums of squares, 1e17 each, would be off by tens.
    h = torch.randn(36, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sums = SpliceSums(standard_sae(), None)
    for part in (h + 1e8).split(5):
        sums._add_tokens(part, part)
    expected = ((h - h.mean(0)) ** 2).sum().item()
    assert sums.variation == pytest.approx(expected, rel=1e-6)


def test_clamp_is_measured_in_residual_norms(model):
    sae = signed_identity_sae()
    sae.W_dec.data *= torch.arange(1.0, 33.0)[:, None]  # decoder norms 1 ... 32
    fit = check_fit(model, sae, HOOK_POINT, [batch_of(SEQUENCES)], clamp_value=-3.0)
    h = torch.cat([hidden(model, ids)[1:] for ids in SEQUENCES])
    z = torch.cat([h, -h], dim=1).relu().double().numpy()
    written = sorted(
        (3 + z[:, j][z[:, j] > 0].mean()) * (j + 1) for j in range(32) if (z[:, j] > 0).any()
    )
    assert len(written) == 32
    expected = (written[15] + written[16]) / 2 / h.norm(dim=1).mean().item()
    assert fit.clamp_ratio == pytest.approx(expected, rel=1e-5)
    assert fit.clamp_value == -3.0


def test_clamp_of_an_sae_that_rescales_its_input(model):
    sae = signed_identity_sae(normalize_activations="layer_norm")
    fit = check_fit(model, sae, HOOK_POINT, [batch_of(SEQUENCES)], clamp_value=-1e7)
    h = torch.cat([hidden(model, ids)[1:] for ids in SEQUENCES])
    expected = 1e7 * h.std(-1).mean() / h.norm(dim=1).mean()
    assert fit.clamp_ratio == pytest.approx(expected.item(), rel=1e-5)


def test_a_shuffled_sae_does_not_fit(model):
    good = signed_identity_sae()
    shuffled = signed_identity_sae()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    shuffled.W_dec.data = shuffled.W_dec.data[order]
    batches = [batch_of(SEQUENCES)]
    assert verdict(check_fit(model, good, HOOK_POINT, batches)).outcome == "doubtful"
    found = verdict(check_fit(model, shuffled, HOOK_POINT, batches))
    assert found.outcome == "does not fit"
    assert "of the variance is unexplained; more than 0.7 is no fit." in found.reasons[0]


def test_hook_points_that_return_tuples(model):
    attention = "model.layers.1.self_attn"
    identity = check_fit(model, signed_identity_sae(), attention, [batch_of(SEQUENCES)])
    assert identity.loss_added == 0.0
    zeroed = check_fit(model, standard_sae(), attention, [batch_of(SEQUENCES)])
    assert abs(zeroed.ablation_loss_added) > 1e-3


@pytest.mark.parametrize(
    ("recorded", "given", "agrees"),
    [
        (HOOK_POINT, HOOK_POINT, True),
        (HOOK_POINT, "model.layers.1", True),
        ("blocks.2.hook_resid_pre", HOOK_POINT, True),
        ("blocks.1.hook_resid_pre", HOOK_POINT, False),
        ("blocks.2.hook_resid_post", HOOK_POINT, False),
        ("blocks.1.hook_mlp_out", HOOK_POINT, False),
        (None, HOOK_POINT, None),
    ],
)
def test_recorded_hook_point(model, recorded, given, agrees):
    sae = signed_identity_sae()
    sae.cfg.metadata.hook_name = recorded
    fit = check_fit(model, sae, given, [batch_of(SEQUENCES)])
    assert (fit.recorded_hook_point, fit.hook_point_agrees) == (recorded, agrees)


@pytest.mark.parametrize(
    ("recorded", "given", "agrees"),
    [
        ("gemma-2-2b", "google/gemma-2-2b", True),
        ("Org/Model", "org/model/", True),
        ("gemma-2-2b", "google/gemma-2-2b-it", False),
        ("gemma-2-2b", ".", None),  # a folder may have any name
        (None, "google/gemma-2-2b", None),
        ("gemma-2-2b", None, None),
    ],
)
def test_recorded_model(model, recorded, given, agrees):
    sae = signed_identity_sae()
    sae.cfg.metadata.model_name = recorded
    fit = check_fit(model, sae, HOOK_POINT, [batch_of(SEQUENCES)], model_name=given)
    assert (fit.recorded_model, fit.model_agrees) == (recorded, agrees)


GOOD = Fit(
    d_in=100,
    d_sae=1000,
    recorded_hook_point="blocks.1.hook_resid_post",
    hook_point_agrees=True,
    recorded_model="gemma-2-2b",
    model_agrees=False,  # alone it decides nothing
    refusal=None,
    num_tokens=5000,
    num_predictions=4900,
    fvu=0.1,
    l0=10.0,
    num_dead=100,
    loss=2.0,
    loss_added=0.1,
    ablation_loss_added=8.0,
    mean_residual_norm=50.0,
    clamp_value=-500.0,
    clamp_ratio=10.0,
)


def test_a_good_measurement_fits_without_a_word():
    assert verdict(GOOD) == check.Verdict("fits", ())


@pytest.mark.parametrize(
    ("changes", "outcome", "says"),
    [
        ({"fvu": 0.5}, "doubtful", "0.5 of the variance is unexplained; up to 0.4 is usual."),
        ({"fvu": 1.2}, "does not fit", "1.2 of the variance is unexplained; more than 0.7"),
        (
            {"loss_added": 0.5, "ablation_loss_added": 50.0},
            "doubtful",
            "adds 0.5 nats per token; up to 0.3 is usual.",
        ),
        (
            {"loss_added": 1.5, "ablation_loss_added": 50.0},
            "does not fit",
            "adds 1.5 nats per token; more than 1 is no fit.",
        ),
        ({"ablation_loss_added": 0.5}, "doubtful", "recovers 0.8 of the loss that zeros cost; at"),
        ({"ablation_loss_added": 0.2}, "does not fit", "recovers 0.5 of the loss that zeros cost"),
        ({"ablation_loss_added": 0.01}, "doubtful", "what splicing costs cannot be judged"),
        ({"l0": 0.5}, "does not fit", "Only 0.5 features are active per token"),
        ({"l0": 26.0}, "doubtful", "more than 0.25 of the width 100"),
        ({"num_dead": 600}, "doubtful", "60% of the features were never active"),
        ({"clamp_ratio": 0.1}, "doubtful", "writes 0.1 times the mean residual norm and hardly"),
        ({"clamp_ratio": 150.0}, "doubtful", "writes 150 times the mean residual norm and wipes"),
        ({"hook_point_agrees": False}, "doubtful", "reads blocks.1.hook_resid_post, which is"),
        ({"num_tokens": 999, "num_dead": 0}, "doubtful", "999 counted tokens are little text"),
        ({"refusal": "it is a transcoder."}, "does not fit", "cannot use it: it is a transcoder."),
    ],
)
def test_each_measure_out_of_range_has_its_sentence(changes, outcome, says):
    found = verdict(replace(GOOD, **changes))
    assert found.outcome == outcome
    [reason] = found.reasons
    assert says in reason


@pytest.mark.parametrize(
    "changes",
    [
        {"fvu": 0.4},
        {"loss_added": 0.3},
        {"clamp_ratio": None},
        {"clamp_ratio": 0.2},
        {"hook_point_agrees": None},
        # Many features had hardly an occasion on so little text.
        {"num_dead": 900, "num_tokens": 1999},
    ],
)
def test_what_is_in_range_is_not_mentioned(changes):
    assert verdict(replace(GOOD, **changes)).outcome == "fits"


def test_fraction_of_loss_recovered():
    assert GOOD.loss_recovered == pytest.approx(1 - 0.1 / 8)
    assert replace(GOOD, ablation_loss_added=0.04).loss_recovered is None
    assert replace(GOOD, ablation_loss_added=-1.0).loss_recovered is None


def test_what_guards_refuse_is_measured_all_the_same(model):
    fit = check_fit(model, saelens_sae("abstopk", k=4), HOOK_POINT, [batch_of(SEQUENCES)])
    assert fit.clamp_ratio is None
    assert "abstopk" in (fit.refusal or "")
    assert fit.fvu > 0


class TestErrors:
    def test_width(self, model):
        with pytest.raises(UserError, match="residual width 16, got 8"):
            check_fit(model, standard_sae(d_in=8), HOOK_POINT, [batch_of(SEQUENCES)])

    def test_hook_point(self, model):
        with pytest.raises(UserError, match=r"3 decoder layers, got 'blocks\.7"):
            check_fit(model, standard_sae(), "blocks.7.hook_resid_post", [batch_of(SEQUENCES)])

    def test_hook_point_of_another_width(self, model):
        with pytest.raises(UserError, match="must be 16 wide as the SAE is, got 32"):
            check_fit(model, standard_sae(), "model.layers.1.mlp.gate_proj", [batch_of(SEQUENCES)])

    @pytest.mark.parametrize("sequences", [[], [[2], [2, 1]], [[2, 5]], [[2, 5, 1, 5]]])
    def test_too_little_text(self, model, sequences):
        with pytest.raises(UserError, match="different counted tokens that follow each other"):
            check_fit(model, standard_sae(), HOOK_POINT, [batch_of(sequences)] if sequences else [])

    def test_training_model(self, model):
        with pytest.raises(UserError, match="must be in evaluation mode"):
            check_fit(model.train(), standard_sae(), HOOK_POINT, [batch_of(SEQUENCES)])

    def test_activations_that_are_not_finite(self, model):
        model.model.embed_tokens.weight.data[SEQUENCES[0][1]] = torch.nan
        with pytest.raises(UserError, match="activations at the hook point must be finite"):
            check_fit(model, standard_sae(), HOOK_POINT, [batch_of(SEQUENCES)])

    def test_reconstructions_that_are_not_finite(self, model):
        sae = signed_identity_sae()
        sae.b_dec.data[3] = torch.inf
        with pytest.raises(UserError, match=r"reconstructions must be finite.*check its weights"):
            check_fit(model, sae, HOOK_POINT, [batch_of(SEQUENCES)])

    def test_losses_that_are_not_finite(self, model):
        model.model.layers[2].mlp.down_proj.weight.data.fill_(torch.nan)
        with pytest.raises(UserError, match=r"loss must be finite.*as they are"):
            check_fit(model, standard_sae(), HOOK_POINT, [batch_of(SEQUENCES)])

    def test_reconstruction_of_another_width(self, model):
        sae = saelens_sae("transcoder", d_out=8, apply_b_dec_to_input=False)
        with pytest.raises(UserError, match="must reconstruct what it reads, 16 wide, got 8"):
            check_fit(model, sae, HOOK_POINT, [batch_of(SEQUENCES)])


def test_the_model_is_left_as_it_was(model):
    ids = torch.tensor([SEQUENCES[0]])
    before = model(input_ids=ids).logits
    check_fit(model, standard_sae(), HOOK_POINT, [batch_of(SEQUENCES)])
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not any(module._forward_hooks for module in model.modules())
