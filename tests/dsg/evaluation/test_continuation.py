import pytest
import torch

from dsg.errors import UserError
from dsg.evaluation.generation import (
    continuation_rouge,
    greedy_continuation,
    is_measurable,
    mean_rouge,
)
from dsg.lm.tokens import pad_sequences
from tests.dsg.evaluation.scoring_helpers import tiny_guard
from tests.helpers import EOS, PAD, tiny_model

NEW = 6


def reference(model, prompt, guard=None):
    """One row, no padding, no cache: the whole sequence again for every token."""
    ids = list(prompt)
    for _ in range(NEW):
        inputs = torch.tensor([ids])
        if guard is None:
            logits = model(inputs).logits
        else:
            prompt_mask = torch.arange(len(ids))[None] < len(prompt)
            with guard.attached(model, decision="prompt"):
                logits = model(inputs, prompt_mask=prompt_mask).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


@pytest.fixture
def prompts():
    return [[2, 5, 9, 14], [2, 7], [2, 20, 21, 22, 23, 6], [2, 11, 4]]


@pytest.mark.parametrize("guarded", [False, True])
@torch.no_grad()
def test_equals_a_loop_over_tokens(model, tokenizer, prompts, guarded):
    guard = tiny_guard(model, tokenizer, 0.3) if guarded else None
    batch = pad_sequences(prompts, PAD, [PAD, EOS, 2], side="left")
    found = greedy_continuation(model, batch, NEW, PAD, guard)
    for ids, prompt in zip(found.tolist(), prompts, strict=True):
        wanted = reference(model, prompt, guard)
        assert ids == wanted + [PAD] * (len(ids) - len(wanted))


@torch.no_grad()
def test_guard_changes_what_is_said(model, tokenizer, prompts):
    batch = pad_sequences(prompts, PAD, [PAD, EOS, 2], side="left")
    plain = greedy_continuation(model, batch, NEW, PAD)
    guard = tiny_guard(model, tokenizer, 0.3)
    with guard.attached(model, decision="prompt") as attachment:
        model(**batch.model_inputs())
    assert attachment.triggered.any()
    assert not torch.equal(plain, greedy_continuation(model, batch, NEW, PAD, guard))


def test_own_continuation_scores_one(model, tokenizer):
    starts = ["w3 w1 w4", "w15 w9 w2"]
    rows = [tokenizer(start)["input_ids"] for start in starts]
    texts = [
        f"{start} {tokenizer.decode(reference(model, row), skip_special_tokens=True)}"
        for start, row in zip(starts, rows, strict=True)
    ]
    values = continuation_rouge(
        model, tokenizer, [*texts, "w3 w1 w4 w25 w25"], prompt_tokens=4, new_tokens=NEW
    )
    assert values.dtype == torch.float64
    assert values[:2].tolist() == [1.0, 1.0]
    assert values[2] < 1.0


def test_batches_change_nothing(model, tokenizer):
    texts = [f"w{i} w{i + 1} w{i + 2} w{i + 3} w{i + 4} w1 w2" for i in range(7)]
    settings = {"prompt_tokens": 3, "new_tokens": 4}
    together = continuation_rouge(model, tokenizer, texts, **settings)
    apart = continuation_rouge(model, tokenizer, texts, batch_size=2, **settings)
    assert torch.equal(together, apart)


def test_model_is_left_as_it_was(tokenizer):
    model = tiny_model()
    before = model.generation_config.to_dict()
    continuation_rouge(model, tokenizer, ["w1 w2 w3 w4"], prompt_tokens=2, new_tokens=2)
    assert model.generation_config.to_dict() == before


def test_short_text(model, tokenizer):
    with pytest.raises(UserError, match="more than 4 tokens each, got one of 3"):
        continuation_rouge(model, tokenizer, ["w1 w2"], prompt_tokens=4)


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens"])
def test_no_tokens(model, tokenizer, name):
    with pytest.raises(UserError, match=f"`{name}` must be at least 1, got 0"):
        continuation_rouge(model, tokenizer, ["w1 w2"], **{name: 0})


def test_mean_has_students_interval():
    estimate = mean_rouge(torch.tensor([0.2, 0.4, 0.6], dtype=torch.float64))
    # Standard deviation 0.2, two degrees of freedom: 4.3027 * 0.2 / sqrt(3) = 0.4968.
    assert (estimate.value, estimate.n) == (pytest.approx(0.4), 3)
    assert estimate.low == 0.0  # 0.4 - 0.4968, cut
    assert estimate.high == pytest.approx(0.8968, abs=1e-4)
    assert mean_rouge(torch.tensor([0.5])).low is None


@pytest.mark.parametrize(
    ("memorised", "unseen", "measurable"),
    [(0.4, 0.2, True), (0.39, 0.2, False), (0.1, 0.0, True), (0.0, 0.0, False)],
)
def test_measurable_means_twice_as_well(memorised, unseen, measurable):
    values = (torch.tensor([value], dtype=torch.float64) for value in (memorised, unseen))
    assert is_measurable(*values) is measurable
