"""Several layers and policies against a brute-force second implementation."""

import pytest
import torch

from dsg.errors import UserError
from dsg.guard.guard import GuardStack
from tests.guard_reference import make_guard
from tests.helpers import jumprelu_sae, random_ids, standard_sae, tiny_model

MODEL = tiny_model(num_layers=4, attn_implementation="sdpa").double()
IDS = random_ids(16, 7)
SAES = {1: standard_sae(dtype="float64"), 2: jumprelu_sae(dtype="float64", seed=3)}


def plain_hidden_states():
    with torch.no_grad():
        return MODEL(IDS, output_hidden_states=True).hidden_states


def guard_at(layer, feature_ids, quantile=0.5, **changes):
    """A guard that triggers on a share of IDS, judged in the unedited model."""
    settings = {"hook_point": f"blocks.{layer}.hook_resid_post", **changes}
    guard = make_guard(SAES[layer], feature_ids, **settings)
    threshold = guard.statistic(MODEL, IDS).quantile(quantile).item()
    return guard.replace(threshold=threshold)


GUARDS = [
    guard_at(2, [5, 9], value=-6.0),
    guard_at(1, [12, 3], value=-4.0),
    guard_at(1, [3, 20], 0.6, value=-5.0),
]


def brute_force(guards, policy):
    """Layer by layer, row by row, token by token, with the full SAEs; logits and decisions."""
    votes = {}  # guard index -> one bool per row
    heard = []
    handles = []

    def edit_at(layer):
        def edit(_module, _args, h):
            sae = SAES[layer]
            z = sae.encode(h)
            place = f"blocks.{layer}.hook_resid_post"
            here = [i for i, guard in enumerate(guards) if guard.hook_point == place]
            for i in here:
                fires = (z[..., guards[i].feature_ids] > 0).any(-1)
                votes[i] = [fires[row].sum().item() / 7 > guards[i].threshold for row in range(16)]
                heard.append(i)
            z_new = z.clone()
            for row in range(16):
                num_open = sum(votes[i][row] for i in heard)
                for i in here:
                    acts = {
                        "own": votes[i][row],
                        "any": num_open >= 1,
                        "majority": 2 * num_open > len(heard),
                    }[policy]
                    for t in range(7):
                        if acts and any(z[row, t, j] > 0 for j in guards[i].feature_ids):
                            for j in guards[i].feature_ids:
                                if z_new[row, t, j] == z[row, t, j]:
                                    z_new[row, t, j] = guards[i].clamp_value
            return h + sae.decode(z_new) - sae.decode(z)

        return edit

    for layer in SAES:
        handles.append(MODEL.model.layers[layer].register_forward_hook(edit_at(layer)))
    with torch.no_grad():
        logits = MODEL(IDS).logits
    for handle in handles:
        handle.remove()
    return logits, [votes[i] for i in range(len(guards))]


def run(guards, policy="own"):
    with GuardStack(guards, policy).attached(MODEL) as attachment, torch.no_grad():
        return MODEL(IDS).logits, attachment


@pytest.mark.parametrize("policy", ["own", "any", "majority"])
def test_guards_of_two_layers_equal_brute_force(policy):
    logits, attachment = run(GUARDS, policy)
    expected, votes = brute_force(GUARDS, policy)
    torch.testing.assert_close(logits, expected, atol=1e-8, rtol=1e-6)
    assert [decision.tolist() for decision in attachment.decisions] == votes
    # The rows differ in who is open, so the policies differ from each other.
    assert len(set(zip(*votes, strict=True))) > 3


def test_policies_differ():
    outputs = [run(GUARDS, policy)[0] for policy in ("own", "any", "majority")]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    assert not torch.equal(outputs[0], outputs[2])


def test_triggered_means_that_some_guard_may_edit():
    _, votes = brute_force(GUARDS, "any")
    upstream = [votes[1][row] or votes[2][row] for row in range(16)]
    for policy, expected in (
        ("own", [any(row) for row in zip(*votes, strict=True)]),
        ("any", [any(row) for row in zip(*votes, strict=True)]),
    ):
        assert run(GUARDS, policy)[1].triggered.tolist() == expected
    # Two guards at the first layer: a majority there means both, after it two of three.
    majority = run(GUARDS, "majority")[1].triggered.tolist()
    assert all(up or not row for row, up in zip(majority, upstream, strict=True))


@pytest.mark.parametrize("policy", ["own", "any", "majority"])
def test_decisions_never_depend_on_the_other_guards_of_the_hook_point(policy):
    alone = [run([guard])[1].decisions[0] for guard in GUARDS[1:]]
    together = run(GUARDS[1:], policy)[1].decisions
    backwards = run(GUARDS[:0:-1], policy)[1].decisions[::-1]
    for one, two, three in zip(alone, together, backwards, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_an_untriggered_stack_is_bit_identical_to_no_guard():
    with torch.no_grad():
        plain = MODEL(IDS).logits
    silent = [guard.replace(threshold=1.0) for guard in GUARDS]
    for policy in ("own", "any", "majority"):
        assert torch.equal(run(silent, policy)[0], plain)
    only = GUARDS[1]
    with only.attached(MODEL), torch.no_grad():
        single = MODEL(IDS).logits
    assert torch.equal(run([silent[0], only, silent[2]])[0], single)


def test_downstream_guards_read_the_edited_stream():
    # The upstream edit destroys what the downstream guard looks for, or makes it up.
    upstream = guard_at(1, [0, 3, 7], 0.0, value=-200.0).replace(threshold=0.0)
    alone = run([GUARDS[0]])[1].decisions[0]
    behind = run([GUARDS[0], upstream])[1].decisions[0]
    assert not torch.equal(alone, behind)


def test_generation_follows_guards_of_two_layers():
    with GuardStack(GUARDS, "any").attached(MODEL, "prompt") as attachment, torch.no_grad():
        cache = MODEL(IDS[:, :3]).past_key_values
        for t in range(3, 7):
            last = MODEL(IDS[:, t : t + 1], past_key_values=cache).logits
        cached = attachment.triggered
        prompt_mask = torch.arange(7)[None].expand_as(IDS) < 3
        whole = MODEL(IDS, prompt_mask=prompt_mask).logits
    assert torch.equal(attachment.triggered, cached)
    torch.testing.assert_close(last[:, 0], whole[:, -1], atol=1e-8, rtol=1e-6)


def test_checkpointing_hears_only_the_layers_before():
    guards = [guard.replace(value=-3.0) for guard in GUARDS]
    with GuardStack(guards, "majority").attached(MODEL):
        expected = torch.autograd.grad(MODEL(IDS, labels=IDS).loss, list(MODEL.parameters()))
        MODEL.train()
        MODEL.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            loss = MODEL(IDS, labels=IDS, use_cache=False).loss
            grads = torch.autograd.grad(loss, list(MODEL.parameters()))
        finally:
            MODEL.gradient_checkpointing_disable()
            MODEL.eval()
    for mine, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_guard_at_an_unknown_place_attaches_none_of_them():
    stray = GUARDS[0].replace(hook_point="model.norm")
    lost = GUARDS[0].replace(hook_point="blocks.9.hook_resid_post")
    with GuardStack([GUARDS[1], stray]).attached(MODEL):
        pass  # any module inside the decoder will do
    with pytest.raises(UserError, match="one of the model's 4 decoder layers"):
        GuardStack([GUARDS[1], lost]).attached(MODEL).__enter__()
    assert not MODEL.model.layers[1]._forward_hooks


def test_two_saes_at_one_place_are_refused_whatever_its_name():
    other = make_guard(standard_sae(dtype="float64", seed=9), [12], hook_point="model.layers.1")
    with pytest.raises(UserError, match="feature 12 has different decoder rows"):
        GuardStack([GUARDS[1], other]).attached(MODEL).__enter__()
    assert not MODEL.model.layers[1]._forward_hooks
