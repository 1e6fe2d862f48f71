from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsg.errors import UserError
from dsg.guard.gate import (
    CusumGate,
    DensityGate,
    OpenGate,
    WindowGate,
    decide,
    density,
)

DENSITY = DensityGate(0.5)


def row(bits):
    return torch.tensor([[bit == "1" for bit in bits]])


def test_density_is_zero_where_nothing_counts():
    counts = torch.tensor([0, 1, 2]), torch.tensor([0, 2, 3])
    assert density(*counts).tolist() == [0.0, 0.5, 2 / 3]


def decided(gate, fired, counted, prompt=None, earlier=None, **options):
    """The decision where tokens fire by the first, the second or both of two features."""
    both = torch.arange(fired.shape[1]) % 3 == 0
    active = torch.stack([fired, fired & both], -1)
    if fired.shape[1] % 2:
        active = active.flip(-1)
    return decide(gate, active, counted, prompt, earlier, **options)


def test_tokens_fire_where_they_count_and_any_feature_is_active():
    active = torch.tensor([[[0, 1], [0, 0], [1, 0]]]).bool()
    _, evidence = decide(DENSITY, active, row("110"))
    assert (evidence.num_fired.tolist(), evidence.num_counted.tolist()) == ([1], [2])


def test_gate_is_strict_and_per_sequence():
    fired = torch.cat([row("1100"), row("1110"), row("0000")])
    counted = torch.cat([row("1111"), row("1111"), row("0000")])
    positions, evidence = decided(DENSITY, fired, counted)
    assert positions.tolist() == [[False] * 4, [True] * 4, [False] * 4]
    assert evidence.triggered.tolist() == [False, True, False]
    assert evidence.density.tolist() == [0.5, 0.75, 0.0]


def test_nothing_counted_is_not_triggered_even_at_threshold_zero():
    for gate in (DensityGate(0.0), OpenGate()):
        positions, _ = decided(gate, row("000"), row("000"))
        assert not positions.any()


def test_continuation_triggers_at_the_position_that_exceeds_and_stays():
    # Prompt 0 of 2; then 1/3, 2/4, 2/5, 2/6: exceeds 0.4 at the fourth token and stays.
    fired, counted, prompt = row("001100"), row("111111"), row("110000")
    positions, evidence = decided(DensityGate(0.4), fired, counted, prompt)
    assert positions.tolist() == [[False, False, False, True, True, True]]
    assert evidence.triggered.tolist() == [True]
    assert evidence.density.tolist() == [2 / 6]


def test_frozen_keeps_the_prompts_decision_and_density():
    fired, counted, prompt = row("001111"), row("111111"), row("110000")
    positions, evidence = decided(DensityGate(0.4), fired, counted, prompt, running=False)
    assert not positions.any()
    assert evidence.density.tolist() == [0.0]


def statistics_of(gate, fired, counted):
    """The definition, one sequence and one position at a time, in exact fractions."""
    found, level, peak = [], Fraction(0), Fraction(0)
    flags = []
    for fires, counts in zip(fired, counted, strict=True):
        if counts:
            flags.append(fires)
        if isinstance(gate, WindowGate):
            w = gate.size
            runs = [flags[i : i + w] for i in range(len(flags) - w + 1)] or [flags]
            value = max((Fraction(sum(run), len(run)) for run in runs if run), default=Fraction(0))
        elif isinstance(gate, CusumGate):
            leak = Fraction(max(1, round(gate.leak * 65536)), 65536)
            level = max(Fraction(0), level + fires - leak) if counts else level
            peak = max(peak, level)
            value = peak
        else:
            value = Fraction(sum(flags), len(flags)) if flags else Fraction(0)
        found.append(float(value))
    return found


GATES = st.one_of(
    st.floats(0, 1).map(DensityGate),
    st.builds(WindowGate, st.floats(0, 1), st.integers(1, 5)),
    st.builds(CusumGate, st.floats(0, 1), st.floats(0.05, 0.95)),
    st.just(OpenGate()),
)
TOKENS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=12)


def tensors(tokens):
    counted = torch.tensor([[counts for counts, _ in tokens]])
    return torch.tensor([[active and counts for counts, active in tokens]]), counted


@given(GATES, TOKENS)
def test_statistics_equal_their_definition(gate, tokens):
    fired, counted = tensors(tokens)
    statistic, _ = gate.follow(fired[..., None], counted, gate.start(1, fired.device))
    assert statistic[0].tolist() == statistics_of(gate, fired[0].tolist(), counted[0].tolist())


@given(GATES, TOKENS, TOKENS, st.integers(0, 3))
def test_padding_and_the_other_sequences_change_nothing(gate, tokens, others, pads):
    fired, counted = tensors(tokens)
    alone, evidence = decided(gate, fired, counted)
    more = tensors(others)
    length = max(len(tokens), len(others)) + pads
    batch = []
    for mine, theirs in zip((fired, counted), more, strict=True):
        padded = torch.zeros(2, length, dtype=torch.bool)
        padded[0, length - len(others) :] = theirs[0]
        padded[1, pads : pads + len(tokens)] = mine[0]
        batch.append(padded)
    positions, seen = decided(gate, *batch)
    assert torch.equal(positions[1, pads : pads + len(tokens)], alone[0])
    assert seen.statistic[1] == evidence.statistic[0]
    assert seen.density[1] == evidence.density[0]


def test_window_and_cusum_survive_dilution_that_hides_from_density():
    gates = DensityGate(0.4), WindowGate(0.4, 10), CusumGate(2.0, 0.4)
    passage, around = "1101101110", "0001000000" * 20
    for text in (passage, around + passage + around):
        fired = row(text)
        counted = torch.ones_like(fired)
        found = {gate.kind: decided(gate, fired, counted)[1].triggered.item() for gate in gates}
        assert found == {"density": text == passage, "window": True, "cusum": True}
    # And text without the passage is left alone by all three.
    fired = row(around * 2)
    for gate in gates:
        assert not decided(gate, fired, fired | True)[1].triggered


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (DensityGate, (1.5,), r"`threshold` must be a density in \[0, 1\] .* 'density', got 1.5"),
        (DensityGate, (float("nan"),), "`threshold` must be a density .* got nan"),
        (WindowGate, (-0.1, 3), r"`threshold` must be a density in \[0, 1\] .* 'window', got -0.1"),
        (WindowGate, (0.5, 0), "`size` must be at least 1, got 0"),
        (WindowGate, (0.5, 2.5), "`size` must be at least 1, got 2.5"),
        (CusumGate, (float("inf"), 0.5), "`threshold` must be finite and at least 0 .* got inf"),
        (CusumGate, (1.0, 1.0), r"`leak` must be in \(0, 1\), got 1.0"),
        (CusumGate, (1.0, "0.1"), r"`leak` must be in \(0, 1\), got '0.1'"),
    ],
)
def test_bad_gates_are_refused(kind, fields, message):
    with pytest.raises(UserError, match=message):
        kind(*fields)


def test_calibration_sets_the_threshold_and_the_leak_that_retain_text_gives():
    measured = []

    def measure(gate):
        measured.append(gate)
        return torch.tensor([len(measured) / 10])

    found = [
        gate.calibrated(measure, torch.Tensor.item)
        for gate in (DENSITY, WindowGate(1.0, 4), CusumGate(9.0, 0.7))
    ]
    tenths = [torch.tensor(number / 10).item() for number in range(5)]
    assert found == [
        DensityGate(tenths[1]),
        WindowGate(tenths[2], 4),
        CusumGate(tenths[4], leak=tenths[3]),
    ]
    # The leak is a threshold of the density; with it the sum is measured.
    assert isinstance(measured[2], DensityGate)
    assert measured[3] == CusumGate(9.0, leak=tenths[3])


@given(GATES, TOKENS, st.data(), st.booleans())
def test_any_chunking_after_the_prompt_gives_the_same_decisions(gate, tokens, data, running):
    fired, counted = tensors(tokens)
    length = len(tokens)
    end = data.draw(st.integers(1, length - 1))
    prompt = (torch.arange(length) < end)[None]
    whole, evidence = decided(gate, fired, counted, prompt, running=running)

    parts, seen, start = [], None, 0
    bounds = sorted({end, length, data.draw(st.integers(end, length))})
    for stop in bounds:
        part = slice(start, stop)
        positions, seen = decided(
            gate, fired[:, part], counted[:, part], prompt[:, part], seen, running=running
        )
        parts.append(positions)
        start = stop
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(seen.triggered, evidence.triggered)
    assert torch.equal(seen.density, evidence.density)
    assert torch.equal(seen.statistic, evidence.statistic)
