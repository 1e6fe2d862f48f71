"""What holds for every gradient objective."""

import copy
from functools import partial

import pytest
import torch

from dsg.evaluation import METHODS
from dsg.lm.likelihood import mean_nll, next_token_logits
from dsg.lm.reference import AdapterOff, FrozenCopy
from dsg.lm.trainable import make_trainable
from dsg.objectives import (
    NPO,
    RMU,
    SCRUB,
    SSD,
    GradDiff,
    GradientAscent,
    Objective,
    OneShot,
    SimNPO,
    TaskVector,
)
from tests.dsg.objectives.toys import rows, token_batch, uncount
from tests.helpers import BOS, tiny_model

FORGET = token_batch([BOS, 5, 6, 7], [BOS, 8, 9])
RETAIN = token_batch([BOS, 10, 11, 12, 13], [BOS, 14])

# SimNPO with the paper's beta has no slope left on texts that a random model finds improbable.
OBJECTIVES = {
    "ga": GradientAscent,
    "grad_diff": GradDiff,
    "grad_diff_kl": partial(GradDiff, retain="kl"),
    "npo": partial(NPO, retain="none"),
    "npo_nll": partial(NPO, retain="nll"),
    "npo_kl": partial(NPO, retain="kl"),
    "simnpo": partial(SimNPO, beta=0.5),
    "scrub": SCRUB,
    "task_vector": TaskVector,
}
ALL = pytest.mark.parametrize("name", OBJECTIVES)


def make(name: str):
    """The objective with another model as its reference, so that no term is zero."""
    return partial(OBJECTIVES[name](), reference=FrozenCopy(tiny_model(seed=1)))


@ALL
def test_the_loss_is_three_float32_numbers_and_its_gradient_is_finite(name):
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model().to(dtype)
        loss = make(name)(model, FORGET, RETAIN)
        assert [value.dtype for value in loss] == [torch.float32] * 3
        assert [value.shape for value in loss] == [()] * 3
        loss.total.backward()
        slopes = [weight.grad for weight in model.parameters()]
        assert all(torch.isfinite(slope).all() for slope in slopes)
        assert any(slope.any() for slope in slopes)


@ALL
def test_one_step_moves_the_forget_likelihood_as_it_must(name):
    model = tiny_model()
    # The reference is the model itself, as in a run; SCRUB has no slope there and must leave first.
    objective = partial(OBJECTIVES[name](), reference=FrozenCopy(model))
    if name == "scrub":
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.05)
    weights = list(model.parameters())
    before = mean_nll(next_token_logits(model, FORGET), FORGET).item()
    slopes = torch.autograd.grad(objective(model, FORGET, RETAIN).forget, weights)
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for weight, slope in zip(weights, slopes, strict=True):
            weight.sub_(1e-3 * slope)
    after = mean_nll(next_token_logits(model, FORGET), FORGET).item()
    if name == "task_vector":
        assert after < before
    elif name == "scrub":
        # Away from the reference, which is not the same as less likely.
        moved = objective(model, FORGET, RETAIN).forget.item()
        model.load_state_dict(kept)
        assert moved < objective(model, FORGET, RETAIN).forget.item()
    else:
        assert after > before


@pytest.mark.parametrize("name", ["grad_diff", "grad_diff_kl", "npo_nll", "npo_kl", "simnpo"])
def test_one_step_of_the_retain_term_lowers_it(name):
    model = tiny_model()
    objective = make(name)
    weights = list(model.parameters())
    before = objective(model, FORGET, RETAIN).retain
    slopes = torch.autograd.grad(before, weights)
    with torch.no_grad():
        for weight, slope in zip(weights, slopes, strict=True):
            weight.sub_(1e-3 * slope)
    assert objective(model, FORGET, RETAIN).retain.item() < before.item()


@ALL
def test_padding_changes_nothing(name):
    model = tiny_model()
    objective = make(name)
    expected = objective(model, FORGET, RETAIN)
    long = [BOS, *([11] * 9)]
    for side in ("right", "left"):
        forget = rows(token_batch([BOS, 5, 6, 7], [BOS, 8, 9], long, side=side), 0, 1)
        retain = rows(token_batch([BOS, 10, 11, 12, 13], [BOS, 14], long, side=side), 0, 1)
        torch.testing.assert_close(
            tuple(objective(model, forget, retain)), tuple(expected), rtol=1e-5, atol=1e-6
        )


@ALL
def test_uncounted_tokens_are_read_but_never_targets(name):
    model = tiny_model()
    objective = make(name)
    # The last token is read by no other position. Uncounted, it must not matter which one it is.
    replaced = token_batch([BOS, 5, 6, 20], [BOS, 8, 9])
    one, other = (objective(model, uncount(batch, 0, 3), RETAIN) for batch in (FORGET, replaced))
    torch.testing.assert_close(tuple(one), tuple(other), rtol=1e-5, atol=1e-6)
    assert one.total.item() != pytest.approx(objective(model, FORGET, RETAIN).total.item())


@ALL
def test_order_does_not_matter_and_sequences_without_a_target_do_not_count(name):
    model = tiny_model()
    objective = make(name)
    expected = objective(model, FORGET, RETAIN)
    forget = token_batch([BOS], [BOS, 8, 9], [BOS, 5, 6, 7])
    retain = token_batch([BOS, 14], [BOS, 10, 11, 12, 13], [BOS])
    torch.testing.assert_close(
        tuple(objective(model, forget, retain)), tuple(expected), rtol=1e-5, atol=1e-6
    )


@ALL
def test_a_batch_without_a_target_has_a_zero_gradient(name):
    model = tiny_model()
    empty = token_batch([BOS], [BOS])
    loss = make(name)(model, empty, empty)
    loss.total.backward()
    assert loss.total.item() == 0.0
    assert not any(w.grad is not None and w.grad.any() for w in model.parameters())


@pytest.mark.parametrize("name", ["npo_kl", "grad_diff_kl", "scrub"])
def test_both_references_give_the_same_loss_and_gradient_for_an_adapter(name):
    results = []
    for reference_of in (AdapterOff, lambda _model: FrozenCopy(tiny_model())):
        torch.manual_seed(0)
        model = make_trainable(tiny_model(), "lora")
        with torch.no_grad():
            for parameter_name, weight in model.named_parameters():
                if "lora_B" in parameter_name:
                    weight.normal_(std=0.1)
        model.train()
        loss = OBJECTIVES[name]()(model, FORGET, RETAIN, reference=reference_of(model))
        loss.total.backward()
        slopes = {n: w.grad for n, w in model.named_parameters() if w.requires_grad}
        results.append((tuple(loss), slopes))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    assert all("lora_" in name for name in results[0][1])
    assert all(slope.any() for slope in results[0][1].values())


def test_mixed_precision_keeps_gradients_and_float32_losses():
    model = tiny_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = NPO(retain="kl")(model, FORGET, RETAIN, reference=FrozenCopy(model))
    assert loss.total.dtype == torch.float32
    loss.total.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_which_need_a_reference():
    needed = {"npo", "npo_nll", "npo_kl", "grad_diff_kl", "scrub"}
    for name, objective in OBJECTIVES.items():
        assert objective().needs_reference == (name in needed)


def test_names_are_the_methods_of_the_results():
    named = (GradientAscent, GradDiff, NPO, SimNPO, RMU, SCRUB, SSD, TaskVector)
    expected = ("ga", "grad_diff", "npo", "simnpo", "rmu", "scrub", "ssd", "task_vector")
    assert tuple(objective.name for objective in named) == expected
    assert all(issubclass(objective, Objective) for objective in named)
    assert all(objective.name in METHODS for objective in named)
    assert [objective for objective in named if issubclass(objective, OneShot)] == [SSD]
