import pytest
import torch

from dsg.errors import UserError
from dsg.guard.guard import GuardStack
from tests.guard_reference import make_guard
from tests.helpers import random_ids, standard_sae, tiny_model

SAE = standard_sae(dtype="float64")
MODEL = tiny_model(attn_implementation="sdpa").double()
IDS = random_ids(12, 7)


def split_guard(feature_ids, **changes):
    """A guard that triggers on about half of IDS."""
    guard = make_guard(SAE, feature_ids, **changes)
    return guard.replace(threshold=guard.density(MODEL, IDS).median().item())


def run(guard):
    with guard.attached(MODEL) as attachment, torch.no_grad():
        return MODEL(IDS).logits, attachment.triggered


def brute_force(guards):
    """Full decode; shared features written by the oldest guard that writes at the token."""

    def edit(_module, _args, h):
        z = SAE.encode(h)
        z_new = z.clone()
        for row in range(z.shape[0]):
            for guard, triggered in guards:
                if not triggered[row]:
                    continue
                for t in range(z.shape[1]):
                    if any(z[row, t, j] > 0 for j in guard.feature_ids):
                        for j in guard.feature_ids:
                            if z_new[row, t, j] == z[row, t, j]:
                                z_new[row, t, j] = guard.clamp_value
        return h + SAE.decode(z_new) - SAE.decode(z)

    handle = MODEL.model.layers[1].register_forward_hook(edit)
    with torch.no_grad():
        logits = MODEL(IDS).logits
    handle.remove()
    return logits


def test_overlapping_guards_equal_brute_force_and_decide_independently():
    guards = [
        split_guard([0, 3, 7], value=-20.0),
        split_guard([3, 9], value=-5.0),
        split_guard([7, 11, 0], value=-9.0),
    ]
    decisions = [guard.density(MODEL, IDS) > guard.threshold for guard in guards]
    patterns = {tuple(bool(d[row]) for d in decisions) for row in range(len(IDS))}
    assert len(patterns) > 3
    logits, triggered = run(GuardStack(guards))
    assert torch.equal(triggered, torch.stack(decisions).any(0))
    expected = brute_force(list(zip(guards, decisions, strict=True)))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_rows_that_only_one_guard_triggers_equal_the_single_guard():
    older, younger = split_guard([0, 3, 7]), split_guard([3, 14])
    for alone, other in ((older, younger), (younger, older)):
        mine, theirs = run(alone)[1], run(other)[1]
        only = mine & ~theirs
        assert only.any()
        stacked = run(GuardStack([older, younger]))[0]
        torch.testing.assert_close(stacked[only], run(alone)[0][only], atol=1e-9, rtol=0)
    silent = younger.replace(threshold=1.0)
    assert torch.equal(run(GuardStack([older, silent]))[0], run(older)[0])
    assert torch.equal(run(GuardStack([silent, older]))[0], run(older)[0])


def test_one_guard_in_a_stack_equals_the_guard():
    guard = split_guard([0, 3])
    stack = GuardStack()
    stack.append(guard)
    assert len(stack) == 1
    assert stack.guards == [guard]
    assert list(stack.parameters()) == []
    assert torch.equal(run(stack)[0], run(guard)[0])


def test_generation_under_a_stack_follows_each_guards_own_state():
    stack = GuardStack([split_guard([0, 3, 7]), split_guard([3, 9])])
    with stack.attached(MODEL, "prompt") as attachment, torch.no_grad():
        cache = MODEL(IDS[:, :3]).past_key_values
        for t in range(3, 7):
            last = MODEL(IDS[:, t : t + 1], past_key_values=cache).logits
        cached = attachment.triggered
        prompt_mask = torch.arange(7)[None].expand_as(IDS) < 3
        whole = MODEL(IDS, prompt_mask=prompt_mask).logits
    assert torch.equal(attachment.triggered, cached)
    torch.testing.assert_close(last[:, 0], whole[:, -1], atol=1e-5, rtol=1e-5)


def test_guards_that_do_not_fit_are_refused():
    stack = GuardStack([make_guard(SAE)])
    with pytest.raises(UserError, match="`policy` must be one of"):
        GuardStack(policy="all")
    with pytest.raises(UserError, match="feature 3 has different decoder rows"):
        stack.append(make_guard(standard_sae(seed=5, dtype="float64")))
    assert len(stack) == 1
    with (
        pytest.raises(UserError, match="`guards` must be at least one, got none"),
        GuardStack().attached(MODEL),
    ):
        pytest.fail("attached")
