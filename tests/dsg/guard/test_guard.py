import inspect
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsg.errors import UserError
from dsg.guard.edit import Clamp, Refusal
from dsg.guard.gate import CusumGate, DensityGate, Gate, OpenGate, WindowGate
from dsg.guard.guard import Guard
from dsg.lm.hooks import read_activations
from dsg.lm.tokens import TokenBatch, pad_sequences
from tests.guard_reference import UNCOUNTED, make_guard, reference
from tests.helpers import HOOK_POINT, SAE_BUILDERS, random_ids, standard_sae, tiny_model

MODEL, SAE = tiny_model(), standard_sae()
# Eager attention takes its softmax in float32, where a float64 mask overflows.
MODEL64 = tiny_model(attn_implementation="sdpa").double()
SAE64 = standard_sae(dtype="float64")
SEQUENCES = st.lists(st.lists(st.integers(1, 29), min_size=1, max_size=7), min_size=1, max_size=4)


def test_public_attributes():
    guard = make_guard(SAE, gate=WindowGate(0.25, 4))
    assert (guard.feature_ids, guard.threshold, guard.clamp_value) == ([3, 0, 7], 0.25, -20.0)
    assert (guard.hook_point, guard.pad_id) == ("blocks.1.hook_resid_post", 0)
    assert (guard.uncounted_ids, guard.refusal_id) == (UNCOUNTED, None)
    assert list(guard.parameters()) == []


def test_replace_shares_tensors_and_keeps_the_rest():
    guard = make_guard(SAE, facts={"a": 1})
    other = guard.replace(value=-5.0, scope="active", pad_id=None)
    assert other.edit == Clamp(-5.0, "active")
    assert other.features is guard.features
    assert (other.gate, other.facts, other.pad_id) == (guard.gate, {"a": 1}, None)
    assert (guard.edit, guard.pad_id) == (Clamp(-20.0), 0)
    assert guard.replace(gate=CusumGate(1.0, 0.5), threshold=2.0).gate == CusumGate(2.0, 0.5)
    with pytest.raises(TypeError, match="size"):
        guard.replace(size=4)


def test_a_guard_takes_at_most_ten_arguments():
    assert len(inspect.signature(Guard).parameters) <= 10


def test_threshold_survives_a_cast_to_bfloat16():
    guard = make_guard(SAE, threshold=0.1).to(torch.bfloat16).half()
    assert guard.threshold == 0.1
    assert guard.features.W_enc.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 1.5}, r"`threshold` must be a density in \[0, 1\] .* 'density', got 1.5"),
        ({"value": float("inf")}, "`value` must be a finite number"),
        ({"scope": "some"}, r"`scope` must be one of \['all', 'active'\], got 'some'"),
        ({"unit": "norms"}, "`unit` must be one of"),
        ({"unit": "residual_norm"}, "`residual_norm` must be given for the unit"),
        ({"residual_norm": 0.0}, "`residual_norm` must be finite and above 0"),
        ({"trigger_limit": -1.0}, "`trigger_limit` must be finite and at least 0, got -1.0"),
        ({"feature_ids": [3], "edit": Refusal(-5.0)}, "`features` must be selected ones and last"),
        ({"hook_point": 3}, "`hook_point` must be a name, got 3"),
        ({"uncounted_ids": [0.5]}, "`uncounted_ids` must be a list of token ids"),
        ({"facts": [1]}, "`facts` must be a mapping"),
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
    early = make_guard(SAE, hook_point="blocks.0.hook_resid_post", gate=OpenGate())
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
    DensityGate,
    lambda _: OpenGate(),
    lambda threshold: WindowGate(threshold, 2),
    lambda threshold: WindowGate(threshold, 5),
    lambda threshold: CusumGate(threshold, 0.25),
    lambda threshold: CusumGate(threshold, 0.6),
]
EDITS = [
    Clamp(-4.0, "all"),
    Clamp(-4.0, "active"),
    Clamp(-4.0, "active", trigger_limit=0.5),
    Refusal(-4.0),
    Refusal(-4.0, trigger_limit=0.5),
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
    guard = make_guard(sae, gate=gate(threshold), edit=edit, unit=unit, residual_norm=3.0)
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
    guard = make_guard(SAE, value=-500.0)
    batch = pad_sequences([*sequences, [6] * 9], 0, UNCOUNTED, side)
    with guard.attached(MODEL), torch.no_grad():
        together = MODEL(**batch.model_inputs()).logits
        for row, ids in enumerate(sequences):
            alone = MODEL(torch.tensor([ids])).logits[0]
            real = batch.attention_mask[row].bool()
            torch.testing.assert_close(together[row][real], alone, atol=1e-5, rtol=0)


@dataclass(frozen=True)
class WeightedGate(Gate):
    """A gate of one's own, which tells the features apart: the sum of the active ones' weights."""

    kind = "weighted"
    weights: tuple[int, ...]

    def start(self, batch, device):
        return (torch.zeros(batch, dtype=torch.long, device=device),)

    def follow(self, active, counted, state):
        del counted
        sums = state[0][:, None] + (active * torch.tensor(self.weights)).sum(-1).cumsum(1)
        return sums.double() / 100, (sums[:, -1],)


def test_a_gate_of_ones_own_is_one_class():
    guard = make_guard(SAES64["standard", "none"], gate=WeightedGate(0.05, (5, -1, 2)))
    ids = random_ids(4, 8)
    ids[:, 3] = UNCOUNTED[0]
    with guard.attached(MODEL64, "prompt") as attachment, torch.no_grad():
        cache = MODEL64(ids[:, :4], attention_mask=torch.ones(4, 4)).past_key_values
        for t in range(4, 8):
            MODEL64(ids[:, t : t + 1], past_key_values=cache)
    everything = torch.ones_like(ids)
    h = read_activations(MODEL64, HOOK_POINT, TokenBatch(ids, everything, everything.bool()))
    expected = []
    for row in (guard.features.encode(h) > 0).tolist():
        fired = [flags for t, flags in enumerate(row) if t != 3]
        expected.append(sum(5 * a - b + 2 * c for a, b, c in fired) / 100)
    assert attachment.statistic.tolist() == expected
    assert len(set(expected)) > 1
    assert guard.statistic(MODEL64, ids, everything).tolist() == expected


def test_a_guard_reads_as_its_parts():
    assert repr(make_guard(SAE, gate=WindowGate(0.3, 8), edit=Refusal(-0.5))) == (
        "Guard(2 features [3, 0] at blocks.1.hook_resid_post, WindowGate(threshold=0.3, size=8), "
        "Refusal(value=-0.5, unit='activation', residual_norm=None, trigger_limit=0.0))"
    )
    assert ", OpenGate(), Clamp(" in repr(make_guard(SAE, gate=OpenGate()))


def test_the_line_of_many_features_stays_short():
    text = repr(make_guard(SAE, list(range(20))))
    assert text.startswith("Guard(20 features [0, 1, 2, 3, 4, 5, 6, 7, ...] at blocks.1")
