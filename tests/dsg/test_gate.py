import torch
from hypothesis import given
from hypothesis import strategies as st

from dsg.gate import Evidence, decide, density, fired_tokens


def row(bits):
    return torch.tensor([[bit == "1" for bit in bits]])


def test_density_is_zero_where_nothing_counts():
    counts = torch.tensor([0, 1, 2]), torch.tensor([0, 2, 3])
    assert density(*counts).tolist() == [0.0, 0.5, 2 / 3]


def test_fired_tokens_are_counted_and_active():
    acts = torch.tensor([[[0.0, 0.1], [0.0, 0.0], [5.0, 0.0]]])
    assert fired_tokens(acts, row("110")).tolist() == [[True, False, False]]


def test_gate_is_strict_and_per_sequence():
    fired = torch.cat([row("1100"), row("1110"), row("0000")])
    counted = torch.cat([row("1111"), row("1111"), row("0000")])
    positions, evidence = decide(fired, counted, torch.ones_like(fired), 0.5)
    assert positions.tolist() == [[False] * 4, [True] * 4, [False] * 4]
    assert evidence.triggered.tolist() == [False, True, False]
    assert evidence.density.tolist() == [0.5, 0.75, 0.0]


def test_nothing_counted_is_not_triggered_even_at_threshold_zero():
    positions, _ = decide(row("000"), row("000"), row("111"), 0.0)
    assert not positions.any()


def test_continuation_triggers_at_the_position_that_exceeds_and_stays():
    # Prompt 0 of 2; then 1/3, 2/4, 2/5, 2/6: exceeds 0.4 at the fourth token and stays.
    fired, counted, prompt = row("001100"), row("111111"), row("110000")
    positions, evidence = decide(fired, counted, prompt, 0.4)
    assert positions.tolist() == [[False, False, False, True, True, True]]
    assert evidence.triggered.tolist() == [True]
    assert evidence.density.tolist() == [2 / 6]


def test_frozen_keeps_the_prompts_decision_and_density():
    fired, counted, prompt = row("001111"), row("111111"), row("110000")
    positions, evidence = decide(fired, counted, prompt, 0.4, running=False)
    assert not positions.any()
    assert evidence.density.tolist() == [0.0]


@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=10),
    st.data(),
    st.floats(0, 1),
    st.booleans(),
)
def test_any_chunking_after_the_prompt_gives_the_same_decisions(tokens, data, threshold, running):
    counted = torch.tensor([[counts for counts, _ in tokens]])
    fired = torch.tensor([[active and counts for counts, active in tokens]])
    length = len(tokens)
    end = data.draw(st.integers(1, length - 1))
    prompt = (torch.arange(length) < end)[None]
    whole, evidence = decide(fired, counted, prompt, threshold, running=running)

    parts, seen, start = [], None, 0
    bounds = sorted({end, length, data.draw(st.integers(end, length))})
    for stop in bounds:
        part = slice(start, stop)
        positions, seen = decide(
            fired[:, part], counted[:, part], prompt[:, part], threshold, seen, running=running
        )
        parts.append(positions)
        start = stop
    assert torch.equal(torch.cat(parts, 1), whole)
    assert isinstance(seen, Evidence)
    assert torch.equal(seen.triggered, evidence.triggered)
    assert torch.equal(seen.density, evidence.density)
