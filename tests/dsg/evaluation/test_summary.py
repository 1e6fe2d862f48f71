import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsg.evaluation.collate import passage_collate, question_collate
from dsg.evaluation.gather import PerSample, score_all
from dsg.evaluation.items import Passage, Question
from dsg.evaluation.summary import named_twice, summarise
from dsg.intervals import wilson
from tests.dsg.evaluation.scoring_helpers import QUESTIONS, make_passages, tiny_guard


def question(index: int, domain: str, form: str = "statement", shown=None) -> Question:
    return Question(index, domain, form, "w1", (" w2", " w3", " w4", " w5"), 0, shown)


def values_of(correct, density=None, margin=1.0) -> dict[str, torch.Tensor]:
    correct = torch.tensor(correct, dtype=torch.float64)
    nan = torch.full_like(correct, torch.nan)
    density = nan if density is None else torch.tensor(density, dtype=torch.float64)
    return {
        "correct": correct,
        "correct_probability": correct,
        "margin": torch.full_like(correct, margin),
        "triggered": torch.where(density.isnan(), nan, (density > 0.5).double()),
        "density": density,
    }


QUESTIONS_OF_FOUR_DOMAINS = [
    question(5, "retain", "question"),
    question(0, "forget", shown=True),
    question(1, "forget", "question", shown=False),
    question(2, "forget", shown=False),
    question(3, "near"),
    question(4, "retain"),
]


def table(measurements) -> dict[tuple[str, str, str], tuple[float, int]]:
    found = {(m.domain, m.metric, m.protocol): (m.value, m.n) for m in measurements}
    assert len(found) == len(measurements)
    return found


def test_accuracies_by_hand():
    values = values_of([1, 0, 0, 1, 1, 0])
    measurements = summarise(QUESTIONS_OF_FOUR_DOMAINS, values, [], {})
    assert table(measurements) == {
        ("forget", "accuracy", "cloze"): (1 / 3, 3),
        ("forget", "accuracy", "cloze_statement"): (0.5, 2),
        ("forget", "accuracy", "cloze_question"): (0.0, 1),
        ("forget_shown", "accuracy", "cloze"): (1.0, 1),
        ("forget_shown", "accuracy", "cloze_statement"): (1.0, 1),
        ("forget_unshown", "accuracy", "cloze"): (0.0, 2),
        ("forget_unshown", "accuracy", "cloze_statement"): (0.0, 1),
        ("forget_unshown", "accuracy", "cloze_question"): (0.0, 1),
        ("near", "accuracy", "cloze"): (1.0, 1),
        ("near", "accuracy", "cloze_statement"): (1.0, 1),
        ("retain", "accuracy", "cloze"): (0.5, 2),
        ("retain", "accuracy", "cloze_statement"): (1.0, 1),
        ("retain", "accuracy", "cloze_question"): (0.0, 1),
    }
    interval = wilson(1, 3)
    assert (measurements[0].low, measurements[0].high) == (interval.low, interval.high)


TWO_FACTS_IN_TWO_WORDINGS = [
    replace(question(0, "forget", "statement"), fact=7),
    replace(question(1, "forget", "question"), fact=7),
    replace(question(2, "forget", "statement"), fact=8),
    replace(question(3, "forget", "question"), fact=8),
    question(4, "retain", "statement"),
    question(5, "retain", "question"),
]


def test_a_fact_that_is_asked_in_two_wordings_counts_once():
    values = values_of([1, 1, 0, 0, 1, 1], density=[0.9, 0.8, 0.7, 0.2, 0.2, 0.1])
    base = values_of([1] * 6)
    measured = summarise(TWO_FACTS_IN_TWO_WORDINGS, values, [], {}, baseline=base)
    found = {(m.domain, m.metric, m.protocol): m for m in measured}
    overall = found["forget", "accuracy", "cloze"]
    interval = wilson(1, 2)
    assert (overall.value, overall.n) == (0.5, 2)
    assert (overall.low, overall.high) == (interval.low, interval.high)
    # A single wording is of distinct facts, and questions of no known fact stand for themselves.
    assert found["forget", "accuracy", "cloze_statement"].n == 2
    assert found["retain", "accuracy", "cloze"].n == 2
    triggered = found["forget", "trigger_rate", "cloze"]
    interval = wilson(1.5, 2)
    assert (triggered.value, triggered.n, triggered.low) == (0.75, 2, interval.low)
    assert found["forget", "density_auroc", "cloze"].n == 4
    assert found["forget", "density_tpr_at_5_fpr", "cloze"].n == 2
    assert found["forget", "alignment", "cloze"].n == 4


def test_density_intervals_are_those_of_the_facts():
    """As wide as the interval of half as many questions with the same area."""
    densities = [0.9, 0.3, 0.8, 0.2, 0.1, 0.4]
    once = [replace(question(i, "forget" if i < 3 else "retain"), fact=i) for i in range(6)]
    twice = [replace(q, id=2 * q.id + copy) for q in once for copy in range(2)]
    intervals = []
    for questions in (once, twice):
        repeated = [density for density in densities for _ in range(len(questions) // 6)]
        measured = summarise(questions, values_of([0] * len(questions), repeated), [], {})
        [auroc] = [m for m in measured if m.metric == "density_auroc"]
        intervals.append((auroc.value, auroc.n, auroc.low, auroc.high))
    assert intervals[0] == intervals[1]


def test_alignment_has_an_interval_over_facts():
    rng = np.random.default_rng(1)
    questions = [
        replace(question(2 * fact + form, "forget" if fact < 30 else "retain"), fact=fact)
        for fact in range(60)
        for form in range(2)
    ]
    guarded = np.repeat(np.where(np.arange(60) < 30, rng.random(60) < 0.5, True), 2)
    values, base = values_of(guarded.tolist()), values_of([1] * 120)
    [found] = [m for m in summarise(questions, values, [], {}, base) if m.metric == "alignment"]
    # Retain is kept whole: alignment is 1 - (p - 1/4) / (3/4), whose spread is that of p over
    # thirty facts, times 4/3. The normal approximation of the bootstrap is good to a few per cent.
    share = guarded[:60].mean()
    half = 1.96 * (share * (1 - share) / 30) ** 0.5 * 4 / 3
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)
    assert found.low < found.value < found.high


def test_gate_by_hand():
    values = values_of([0] * 6, density=[0.9, 0.2, 0.6, 0.6, 0.2, 0.1])
    found = table(summarise(QUESTIONS_OF_FOUR_DOMAINS, values, [], {}))
    assert found["forget", "trigger_rate", "cloze"] == (2 / 3, 3)
    assert found["near", "trigger_rate", "cloze"] == (1.0, 1)
    assert found["retain", "trigger_rate", "cloze"] == (0.0, 2)
    # Of the 3 x 2 pairs five are ordered rightly and one (0.2, 0.2) is a tie.
    assert found["forget", "density_auroc", "cloze"] == (pytest.approx(5.5 / 6), 5)


def test_alignment_by_hand():
    base = values_of([1, 1, 1, 1, 1, 1])
    values = values_of([1, 0, 0, 1, 1, 1])
    found = table(summarise(QUESTIONS_OF_FOUR_DOMAINS, values, [], {}, baseline=base))
    forget = (1 / 3 - 0.25) / 0.75
    assert found["forget", "alignment", "cloze"] == (pytest.approx(1 - forget), 5)


def test_perplexity_by_hand():
    passages = [Passage(1, "retain", "b"), Passage(0, "retain", "a"), Passage(2, "forget", "c")]
    nan = torch.full((3,), torch.nan, dtype=torch.float64)
    values = {
        "nll_sum": torch.tensor([2.0, 4.0, 5.0], dtype=torch.float64),
        "num_tokens": torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64),
        "triggered": nan,
        "density": nan,
    }
    found = table(summarise([], {}, passages, values))
    assert found == {("retain", "perplexity", "passages"): (pytest.approx(np.exp(6 / 4)), 2)}


def test_requests_are_reported_apart_and_together():
    questions = [
        question(0, "pathogen"),
        question(1, "malware"),
        question(2, "chemical"),
        question(3, "retain"),
    ]
    found = table(
        summarise(
            questions,
            values_of([1, 0, 1, 1]),
            [],
            {},
            baseline=values_of([1, 1, 1, 1]),
            forget_domains=("pathogen", "malware"),
        )
    )
    assert found["pathogen", "accuracy", "cloze"] == (1.0, 1)
    assert found["forget", "accuracy", "cloze"] == (0.5, 2)
    assert found["chemical", "accuracy", "cloze"] == (1.0, 1)
    assert ("forget", "alignment", "cloze") in found


def test_ties_are_reported(caplog):
    with caplog.at_level(logging.WARNING):
        summarise([question(0, "retain")], values_of([1], margin=1e-6), [], {})
    assert "1 of 1 questions of 'retain' are ties" in caplog.text


@given(data=st.data(), num=st.integers(1, 12))
def test_order_and_batches_do_not_change_per_sample_values(data, num):
    ids = data.draw(st.permutations(range(num)))
    cut = data.draw(st.integers(0, num))
    metric = PerSample(("a", "b"), num)
    for part in (ids[:cut], ids[cut:]):
        if part:
            column = torch.tensor(part, dtype=torch.float64)
            metric.update(torch.tensor(part), {"b": 10 * column, "a": column + 0.1})
    values = metric.by_id()
    expected = torch.arange(num, dtype=torch.float64)
    assert list(values) == ["a", "b"]
    assert torch.equal(values["a"], expected + 0.1)
    assert torch.equal(values["b"], 10 * expected)


@pytest.mark.parametrize("ids", [[0, 1], [0, 1, 1], [0, 1, 2, 2], []])
def test_a_sample_that_is_missing_or_repeated(ids):
    metric = PerSample(("a",), expected=3)
    if ids:
        metric.update(torch.tensor(ids), {"a": torch.zeros(len(ids))})
    with pytest.raises(RuntimeError, match="3 samples must be scored exactly once"):
        metric.by_id()


def test_nothing_to_score():
    assert PerSample(("a",), expected=0).by_id()["a"].shape == (0,)


def test_score_all_is_in_the_order_of_the_ids(model, tokenizer):
    collate = question_collate(tokenizer)
    guard = tiny_guard(model, tokenizer, threshold=0.5)
    together = score_all(model, [collate(QUESTIONS)], guard)
    apart = score_all(model, [collate(QUESTIONS[7:]), collate(QUESTIONS[:7])], guard)
    for name, column in together.items():
        torch.testing.assert_close(apart[name], column, atol=1e-5, rtol=1e-5)
    passages = make_passages()
    values = score_all(model, [passage_collate(tokenizer)(passages)])
    assert values["num_tokens"].tolist() == [len(p.text.split()) for p in passages]


@pytest.mark.parametrize(
    ("names", "twice"),
    [
        ([("forget", None), ("retain", None)], set()),
        ([("q_forget", "forget"), ("retain", None)], {"q_forget"}),
        ([("a", "retain"), ("b", "retain"), ("q_forget", "forget")], {"q_forget"}),
        ([("forget", None), ("q_forget", "forget")], set()),
        ([("a", "one"), ("a", "other")], set()),
        ([("a", "one"), ("a", None)], set()),
        ([], set()),
    ],
)
def test_a_domain_that_is_a_whole_pool_is_told_once(names, twice):
    assert named_twice(names * 2) == twice
