import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsg.errors import UserError
from dsg.lm.tokens import pad_sequences
from tests.guard_reference import UNCOUNTED, make_guard, reference
from tests.helpers import SAE_BUILDERS, random_ids, standard_sae, tiny_model

MODEL, SAE = tiny_model(), standard_sae()
# Eager attention takes its softmax in float32, where a float64 mask overflows.
MODEL64 = tiny_model(attn_implementation="sdpa").double()
SAE64 = standard_sae(dtype="float64")
SEQUENCES = st.lists(st.lists(st.integers(1, 29), min_size=1, max_size=7), min_size=1, max_size=4)


def test_public_attributes():
    guard = make_guard(SAE, threshold=0.25, gate="token")
    assert (guard.feature_ids, guard.threshold, guard.clamp_value) == ([3, 0, 7], 0.25, -20.0)
    assert (guard.hook_point, guard.gate) == ("blocks.1.hook_resid_post", "token")
    assert list(guard.parameters()) == []


def test_replace_shares_tensors_and_keeps_the_rest():
    guard = make_guard(SAE, facts={"a": 1})
    other = guard.replace(clamp_value=-5.0)
    assert other.clamp_value == -5.0
    assert other.features is guard.features
    assert (other.threshold, other.facts, guard.clamp_value) == (guard.threshold, {"a": 1}, -20.0)


def test_threshold_survives_a_cast_to_bfloat16():
    guard = make_guard(SAE, threshold=0.1).to(torch.bfloat16).half()
    assert guard.threshold == 0.1
    assert guard.features.W_enc.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"threshold": 1.5},
            r"`threshold` must be a density in \[0, 1\] for the gate 'density', got 1.5",
        ),
        ({"threshold": float("nan")}, "`threshold` must be a density"),
        ({"clamp_value": float("inf")}, "`clamp_value` must be a finite number"),
        ({"clamp_scope": "some"}, r"`clamp_scope` must be one of \['all', 'active'\], got 'some'"),
        ({"clamp_unit": "norms"}, "`clamp_unit` must be one of"),
        ({"gate": "open"}, "`gate` must be one of"),
        ({"clamp_unit": "residual_norm"}, "`residual_norm` must be given for clamp_unit"),
        ({"residual_norm": 0.0}, "`residual_norm` must be finite and above 0"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_guard(SAE, **changes)


@settings(max_examples=25, deadline=None)
@given(SEQUENCES, st.sampled_from(["left", "right"]), st.randoms(use_true_random=False))
def test_density_ignores_padding_order_and_batch_size(sequences, side, random):
    guard = make_guard(SAE)
    expected = [reference(MODEL, SAE, guard, ids).density for ids in sequences]
    order = list(range(len(sequences)))
    random.shuffle(order)
    shuffled = [sequences[index] for index in order] + [[5] * 9]
    batch = pad_sequences(shuffled, 0, UNCOUNTED, side)
    densities = guard.density(MODEL, **batch.model_inputs())
    assert densities[:-1].tolist() == [expected[index] for index in order]
    assert densities.dtype == torch.float64


def test_density_without_mask_takes_outer_pads_as_padding():
    guard = make_guard(SAE)
    ids = random_ids(2, 5)
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], 1)
    assert torch.equal(guard.density(MODEL, padded), guard.density(MODEL, ids))


def test_density_of_nothing_counted_is_zero():
    assert make_guard(SAE).density(MODEL, torch.tensor([[2, 1, 1]])).tolist() == [0.0]


def test_density_takes_an_explicit_token_mask():
    guard = make_guard(SAE)
    ids = random_ids(1, 6)
    mask = torch.zeros(1, 6, dtype=torch.bool)
    mask[0, :3] = True
    assert torch.equal(guard.density(MODEL, ids, token_mask=mask), guard.density(MODEL, ids[:, :3]))


def test_density_is_of_the_unedited_model_even_while_guards_are_attached():
    deep = make_guard(SAE)
    early = make_guard(SAE, hook_point="blocks.0.hook_resid_post", threshold=0.0, gate="token")
    ids = random_ids(3, 6)
    expected = deep.density(MODEL, ids)
    with early.attached(MODEL) as attachment:
        MODEL(ids)
        decided = attachment.triggered
        assert torch.equal(deep.density(MODEL, ids), expected)
        assert torch.equal(attachment.triggered, decided)


def test_density_refuses_another_width():
    with pytest.raises(UserError, match="residual width 16, got 8"):
        make_guard(standard_sae(d_in=8)).density(MODEL, random_ids(1, 2))


NORMALIZATIONS = ["none", "layer_norm", "constant_norm_rescale"]
SAES64 = {
    (architecture, normalization): build(dtype="float64", normalize_activations=normalization)
    for architecture, build in SAE_BUILDERS.items()
    for normalization in NORMALIZATIONS
}
GATES = [
    {"gate": "density"},
    {"gate": "token"},
    {"gate": "window", "window_size": 2},
    {"gate": "window", "window_size": 5},
    {"gate": "cusum", "leak": 0.25},
    {"gate": "cusum", "leak": 0.6},
]
EDITS = [
    {"clamp_scope": "all"},
    {"clamp_scope": "active"},
    {"clamp_scope": "active", "trigger_limit": 0.5},
    {"edit": "refusal"},
    {"edit": "refusal", "trigger_limit": 0.5},
]


@settings(max_examples=120, deadline=None)
@given(
    SEQUENCES,
    st.sampled_from(["left", "right"]),
    st.sampled_from(EDITS),
    st.sampled_from(["activation", "residual_norm"]),
    st.sampled_from(GATES),
    st.sampled_from([0.0, 0.3, 0.6]),
    st.sampled_from(sorted(SAES64)),
)
def test_guarded_logits_equal_a_brute_force_full_decode(
    sequences, side, edit, unit, gate, threshold, sae_name
):
    sae = SAES64[sae_name]
    guard = make_guard(
        sae,
        clamp_unit=unit,
        threshold=threshold,
        residual_norm=3.0,
        clamp_value=-4.0,
        **edit,
        **gate,
    )
    batch = pad_sequences(sequences, 0, UNCOUNTED, side)
    with guard.attached(MODEL64) as attachment, torch.no_grad():
        logits = MODEL64(**batch.model_inputs()).logits
    for row, ids in enumerate(sequences):
        expected = reference(MODEL64, sae, guard, ids)
        real = batch.attention_mask[row].bool()
        torch.testing.assert_close(logits[row][real], expected.logits, atol=1e-5, rtol=1e-5)
        assert attachment.triggered[row] == expected.triggered[-1]
        assert attachment.density[row] == expected.density


@settings(max_examples=25, deadline=None)
@given(SEQUENCES, st.sampled_from(["left", "right"]))
def test_float32_logits_do_not_depend_on_the_batch(sequences, side):
    guard = make_guard(SAE, clamp_value=-500.0)
    batch = pad_sequences([*sequences, [6] * 9], 0, UNCOUNTED, side)
    with guard.attached(MODEL), torch.no_grad():
        together = MODEL(**batch.model_inputs()).logits
        for row, ids in enumerate(sequences):
            alone = MODEL(torch.tensor([ids])).logits[0]
            real = batch.attention_mask[row].bool()
            torch.testing.assert_close(together[row][real], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "gate density > 0.3, clamp all to -20)"),
        ({"gate": "window", "window_size": 8}, "gate window of 8 tokens > 0.3, clamp all to -20)"),
        (
            {"gate": "cusum", "leak": 0.25, "threshold": 2.0, "clamp_scope": "active"},
            "gate cusum with leak 0.25 > 2, clamp active to -20)",
        ),
        ({"gate": "token", "edit": "refusal"}, "no gate, refusal feature 7 to -20)"),
        (
            {"clamp_unit": "residual_norm", "residual_norm": 3.0, "clamp_value": -0.5},
            "gate density > 0.3, clamp all to -0.5 residual norms)",
        ),
    ],
)
def test_a_guard_reads_in_one_line(changes, text):
    ids = "2 features [3, 0]" if "edit" in changes else "3 features [3, 0, 7]"
    assert repr(make_guard(SAE, **changes)) == f"Guard({ids} at blocks.1.hook_resid_post, {text}"


def test_the_line_of_many_features_stays_short():
    text = repr(make_guard(SAE, list(range(20))))
    assert text.startswith("Guard(20 features [0, 1, 2, 3, 4, 5, 6, 7, ...] at blocks.1")
    assert len(text) < 160
