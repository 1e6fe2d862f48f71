import itertools

import pytest
import torch

from dsg.errors import UserError
from dsg.lm.likelihood import mean_nll, next_token_logits
from dsg.lm.tokens import TokenBatch
from dsg.objectives.ssd import SSD, DiagonalFisher
from tests.dsg.objectives.toys import TABLE, TableModel, rows, token_batch
from tests.helpers import BOS, PAD, tiny_model

FORGET = token_batch([BOS, 5, 6, 7], [BOS, 8, 9])
RETAIN = token_batch([BOS, 10, 11, 12, 13], [BOS, 14, 15], [BOS, 16, 17])


def fisher(model: torch.nn.Module, *batches) -> dict[str, torch.Tensor]:
    importance = DiagonalFisher(model)
    for batch in batches:
        importance.update(batch)
    return importance.mean()


def ssd(model: torch.nn.Module, retain: TokenBatch = RETAIN, **settings: float) -> tuple[int, int]:
    """One pass over both texts and the change: how many numbers it moved, of how many."""
    objective = SSD(**settings)
    objective.prepare(model)
    objective(model, FORGET, retain)
    before = weights_of(model)
    objective.finish(model)
    after = weights_of(model)
    changed = sum(int((after[name] != weight).sum()) for name, weight in before.items())
    return changed, sum(weight.numel() for weight in before.values())


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_fisher_by_hand():
    # The slope of a target's NLL is softmax - onehot in the row of the token before it.
    batch = token_batch([BOS, 3, 1], [BOS, 4])
    expected = [[0.0] * 5 for _ in range(5)]
    for ids in ([BOS, 3, 1], [BOS, 4]):
        slope = [[0.0] * 5 for _ in range(5)]
        targets = list(itertools.pairwise(ids))
        for before, token in targets:
            for column in range(5):
                slope[before][column] += (TABLE[before][column] - (column == token)) / len(targets)
        for row in range(5):
            for column in range(5):
                expected[row][column] += slope[row][column] ** 2 / 2
    actual = fisher(TableModel(TABLE), batch)["logits"]
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=1e-8)
    # One number by hand: row bos, column 3 is (((.5 - 1) / 2)^2 + .5^2) / 2.
    assert actual[BOS, 3].item() == pytest.approx((0.0625 + 0.25) / 2, rel=1e-5)


def test_fisher_equals_float64_gradients_of_a_transformer():
    model, exact = tiny_model(), tiny_model().double()
    actual = fisher(model, RETAIN)
    expected = {name: torch.zeros_like(weight) for name, weight in exact.named_parameters()}
    for ids in ([BOS, 10, 11, 12, 13], [BOS, 14, 15], [BOS, 16, 17]):
        log_probs = exact(torch.tensor([ids])).logits[0].log_softmax(-1)
        loss = -sum(log_probs[t, ids[t + 1]] for t in range(len(ids) - 1)) / (len(ids) - 1)
        slopes = torch.autograd.grad(loss, list(exact.parameters()))
        for name, slope in zip(expected, slopes, strict=True):
            expected[name] += slope**2 / 3
    for name, importance in actual.items():
        torch.testing.assert_close(importance.double(), expected[name], rtol=1e-3, atol=1e-7)


def test_fisher_does_not_depend_on_batches_padding_or_order(model):
    expected = fisher(model, RETAIN)
    padded = rows(token_batch([BOS, 10, 11, 12, 13], [BOS, 14, 15], [BOS] * 9, side="left"), 1, 0)
    pieces = (token_batch([BOS, 16, 17], [BOS]), padded)
    torch.testing.assert_close(fisher(model, *pieces), expected, rtol=1e-4, atol=1e-7)


def test_fisher_leaves_the_model_alone():
    model = tiny_model(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    before = weights_of(model)
    first, again = fisher(model, FORGET), fisher(model, FORGET)
    # Without dropout, or the two would differ.
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert model.training
    assert not model.model.layers[0].training
    assert all(weight.grad is None for weight in model.parameters())
    torch.testing.assert_close(weights_of(model), before, rtol=0, atol=0)


def test_dampening_by_hand():
    model = torch.nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[8.0, 8.0, 8.0, 8.0]])
    forget = {"weight": torch.tensor([[10.0, 3.0, 5.0, 0.0]])}
    retain = {"weight": torch.tensor([[1.0, 1.0, 2.0, 0.0]])}
    done = SSD(selection_threshold=2.4, dampening=3.0).dampen(model, forget, retain)
    # 10 > 2.4: factor 3/10. 3 > 2.4: factor 3/3. 5 > 4.8: factor 6/5, capped at 1. 0 > 0: no.
    torch.testing.assert_close(model.weight.data, torch.tensor([[2.4, 8.0, 8.0, 8.0]]))
    assert done == (3, 4)
    # The threshold itself is not passed.
    done = SSD(selection_threshold=2.5).dampen(model, forget, retain)
    assert done.num_selected == 2


def test_an_infinite_threshold_changes_nothing(model):
    before = weights_of(model)
    done = ssd(model, selection_threshold=float("inf"), dampening=1e-5)
    assert done == (0, sum(weight.numel() for weight in model.parameters()))
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_weights_only_shrink_and_all_do_at_threshold_zero(model):
    before = weights_of(model)
    ssd(model, selection_threshold=0.0, dampening=100.0)
    for name, weight in model.named_parameters():
        assert (weight.abs() <= before[name].abs()).all()
    assert any(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_forgetting_hurts_the_forget_text_more():
    model = tiny_model()
    # A model that knows both texts, or there is nothing to tell apart.
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = sum(mean_nll(next_token_logits(model, batch), batch) for batch in (FORGET, RETAIN))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def losses() -> list[float]:
        return [
            mean_nll(next_token_logits(model, batch), batch).item() for batch in (FORGET, RETAIN)
        ]

    before = losses()
    changed, total = ssd(model, selection_threshold=5.0, dampening=0.1)
    after = losses()
    assert 0 < changed < total
    assert after[0] - before[0] > 3 * (after[1] - before[1])


def test_only_weights_that_require_gradients_change(model):
    model.requires_grad_(False)
    model.model.layers[1].mlp.down_proj.requires_grad_(True)
    before = weights_of(model)
    ssd(model, selection_threshold=0.0, dampening=0.1)
    moved = {n for n, weight in model.named_parameters() if not torch.equal(weight, before[n])}
    assert moved == {"model.layers.1.mlp.down_proj.weight"}


def test_a_weight_that_a_forward_pass_does_not_use_has_no_importance():
    model = TableModel(TABLE)
    model.unused = torch.nn.Parameter(torch.ones(3))
    importance = fisher(model, token_batch([BOS, 3, 1]))
    assert importance["unused"].tolist() == [0.0] * 3
    SSD(selection_threshold=0.0).dampen(model, importance, importance)
    assert model.unused.tolist() == [1.0] * 3


def test_tied_embeddings_are_dampened_once():
    model = tiny_model(tie_word_embeddings=True)
    tied = model.lm_head.weight
    assert tied is model.model.embed_tokens.weight
    importance = fisher(model, FORGET)
    assert "lm_head.weight" not in importance
    before, name = tied.detach().clone(), "model.embed_tokens.weight"
    halved = {n: value / 2 for n, value in importance.items()}
    SSD(selection_threshold=1.0).dampen(model, importance, halved)
    selected = importance[name] > 0
    torch.testing.assert_close(tied[selected].detach(), before[selected] / 2)
    # The padding token is never read, but its logit is.
    assert selected[PAD].any()


def test_bfloat16_weights_that_are_not_selected_stay_bit_equal():
    model = tiny_model().bfloat16()
    before = weights_of(model)
    ssd(model, selection_threshold=float("inf"))
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_defaults_are_the_methods_own():
    assert (SSD().selection_threshold, SSD().dampening) == (10.0, 1.0)


def test_bad_input(model):
    for threshold in (-1.0, float("nan")):
        with pytest.raises(UserError, match=r"`selection_threshold` must be at least 0, got"):
            SSD(selection_threshold=threshold)
    with pytest.raises(UserError, match=r"`dampening` must be positive and finite, got 0.0"):
        SSD(dampening=0.0)
    with pytest.raises(UserError, match=r"the texts must hold at least one sequence"):
        ssd(model, retain=token_batch([BOS]))
    with pytest.raises(UserError, match=r"must have weights that require gradients, got none"):
        ssd(model.requires_grad_(False))


def test_batches_add_up_and_the_parts_are_the_likelihoods_met_on_the_way(model):
    objective = SSD()
    objective.prepare(model)
    for forget, retain in ((rows(FORGET, 0), rows(RETAIN, 0)), (rows(FORGET, 1), RETAIN)):
        loss = objective(model, forget, retain)
    expected = fisher(model, FORGET)
    torch.testing.assert_close(objective.importances.forget.mean(), expected)
    expected = fisher(model, rows(RETAIN, 0), RETAIN)
    torch.testing.assert_close(objective.importances.retain.mean(), expected)
    nlls = [
        mean_nll(next_token_logits(model, rows(RETAIN, row)), rows(RETAIN, row))
        for row in (0, 1, 2)
    ]
    assert loss.retain.item() == pytest.approx(sum(nlls).item() / 3, rel=1e-5)
    assert loss.total.item() == 0.0
