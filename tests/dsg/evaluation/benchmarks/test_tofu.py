"""The metrics of TOFU against numbers worked out by hand."""

import itertools
import math
import statistics

import numpy as np
import pytest

from dsg.errors import UserError
from dsg.evaluation.benchmarks.tofu import (
    check_retained,
    forget_quality,
    mean_log_probs,
    measure,
    model_utility,
    recognised,
    retained_ratios,
    scores,
    shares,
    truth_ratios,
    unrecognised,
)
from dsg.evaluation.items_file import write_items

LN = math.log
# Two questions with two wrong answers, one with a single one; probabilities per token.
ANSWERS = np.log([[0.5, 0.25, 0.04], [0.2, 0.4, 0.1], [0.1, 0.8, math.nan]])


def test_truth_ratio_is_the_geometric_mean_over_the_right_answer():
    # sqrt(0.25 * 0.04) = 0.1, sqrt(0.4 * 0.1) = 0.2.
    assert truth_ratios(ANSWERS).tolist() == pytest.approx([0.1 / 0.5, 0.2 / 0.2, 0.8 / 0.1])


def test_share_of_the_right_answer():
    assert shares(ANSWERS).tolist() == pytest.approx([0.5 / 0.79, 0.2 / 0.7, 0.1 / 0.9])


def test_uses_of_the_truth_ratio():
    ratios = np.array([0.2, 1.0, 8.0, 0.0])
    assert unrecognised(ratios).tolist() == pytest.approx([0.2, 1.0, 0.125, 0.0])
    assert recognised(ratios).tolist() == pytest.approx([0.8, 0.0, 0.0, 1.0])


def test_log_probabilities_are_per_token():
    columns = {
        "log_prob_0": [-2.0, -3.0],
        "num_tokens_0": [2, 3],
        "log_prob_1": [-5.0, None],
        "num_tokens_1": [2, None],
        "correct": [1, 0],
    }
    found = mean_log_probs(columns)
    assert found[0].tolist() == [-1.0, -2.5]
    assert found[1, 0] == -1.0
    assert math.isnan(found[1, 1])


def test_model_utility_is_the_harmonic_mean():
    means = [0.9, 0.5, 0.25, 0.8]
    assert model_utility(means) == pytest.approx(statistics.harmonic_mean(means))
    # 4 / (1/0.5 + 1/0.25 + 1 + 1)
    assert model_utility([0.5, 0.25, 1.0, 1.0]) == pytest.approx(0.5)
    assert model_utility([0.9, 0.0]) == 0.0


def distance(first, second):
    """Largest gap between two empirical distribution functions."""
    return max(
        abs(
            sum(value <= at for value in first) / len(first)
            - sum(value <= at for value in second) / len(second)
        )
        for at in [*first, *second]
    )


@pytest.mark.parametrize(("size", "shift"), [(4, 0.0), (5, 1.0), (5, 9.0)])
def test_forget_quality_equals_trying_all_permutations(size, shift):
    generator = np.random.default_rng(size)
    first = generator.normal(size=size).tolist()
    second = (generator.normal(size=size + 1) + shift).tolist()
    observed = distance(first, second)
    pooled = [*first, *second]
    outcomes = []
    for chosen in itertools.combinations(range(len(pooled)), size):
        parted = [
            [pooled[i] for i in range(len(pooled)) if (i in chosen) == side] for side in (1, 0)
        ]
        outcomes.append(distance(*parted) >= observed - 1e-12)
    quality, statistic = forget_quality(first, second)
    assert statistic == pytest.approx(observed)
    assert quality == pytest.approx(sum(outcomes) / len(outcomes))


def test_forget_quality_of_the_retained_model_is_one():
    ratios = [0.3, 0.9, 1.4]
    assert forget_quality(ratios, ratios) == (1.0, 0.0)


DOMAINS = {
    "questions": ["forget", "forget", "retain", "real_authors", "world_facts"],
    "passages": ["retain", "forget", "forget"],
    "prompts": ["forget", "world_facts", "forget", "retain", "real_authors"],
}
SAMPLES = {
    "questions": {
        # Of one token each, so that these are probabilities of the answers.
        "log_prob_0": [LN(0.5), LN(0.2), LN(0.5), LN(0.6), LN(0.4)],
        "log_prob_1": [LN(0.1), LN(0.8), LN(0.25), LN(0.3), LN(0.1)],
        "num_tokens_0": [1.0] * 5,
        "num_tokens_1": [1.0] * 5,
    },
    "passages": {"nll_sum": [2 * LN(2), LN(8), 2 * LN(10)], "num_tokens": [2.0, 1.0, 2.0]},
    "prompts": {"rouge_l_recall": [0.4, 0.5, 0.6, 1.0, 0.25]},
}


def test_worked_example():
    found = {
        (m.domain, m.metric): m for m in measure(scores(DOMAINS, SAMPLES), np.array([9.0, 11.0]))
    }
    expected = {
        # exp(-ln 8) and exp(-ln 10): means of 0.125 and 0.1.
        ("forget", "probability"): 0.1125,
        ("forget", "rouge_l_recall"): 0.5,
        # Ratios 0.2 and 4: min(R, 1/R) is 0.2 and 0.25.
        ("forget", "truth_ratio"): 0.225,
        ("retain", "probability"): 0.5,
        ("retain", "rouge_l_recall"): 1.0,
        ("retain", "truth_ratio"): 0.5,  # 1 - 0.25 / 0.5
        ("real_authors", "probability"): 0.6 / 0.9,
        ("real_authors", "rouge_l_recall"): 0.25,
        ("real_authors", "truth_ratio"): 0.5,  # 1 - 0.3 / 0.6
        ("world_facts", "probability"): 0.8,  # 0.4 of 0.5
        ("world_facts", "rouge_l_recall"): 0.5,
        ("world_facts", "truth_ratio"): 0.75,
        # 9 / (2 + 1 + 2 + 1.5 + 4 + 2 + 1.25 + 2 + 4/3)
        ("retain", "model_utility"): 9 / (15.75 + 4 / 3),
        # Both ratios are below both of the reference: so are they in 2 of the 6 ways to part four.
        ("forget", "forget_quality"): 2 / 6,
        ("forget", "ks_statistic"): 1.0,
    }
    assert {key: m.value for key, m in found.items()} == pytest.approx(expected)
    probability = found["forget", "probability"]
    assert (probability.n, probability.low, probability.high) == (
        2,
        pytest.approx(0.1),
        pytest.approx(0.125),
    )
    assert found["retain", "model_utility"].n == 3


def test_the_retained_model_itself_has_no_forget_quality():
    metrics = {m.metric for m in measure(scores(DOMAINS, SAMPLES), None)}
    assert metrics == {"probability", "rouge_l_recall", "truth_ratio", "model_utility"}


def test_utility_interval_holds_the_utility_and_resamples_items_jointly():
    generator = np.random.default_rng(1)
    columns = {
        domain: {
            name: generator.uniform(0.3, 0.9, 12)
            for name in ("probability", "rouge_l_recall", "truth_ratio")
        }
        for domain in ("forget", "retain", "real_authors", "world_facts")
    }
    [utility] = [m for m in measure(columns, None) if m.metric == "model_utility"]
    means = [
        float((1 - values if name == "truth_ratio" else values).mean())
        for domain in ("retain", "real_authors", "world_facts")
        for name, values in columns[domain].items()
    ]
    assert utility.value == pytest.approx(statistics.harmonic_mean(means))
    assert utility.low is not None
    assert utility.high is not None
    assert utility.low < utility.value < utility.high
    assert utility.n == 36


def item(key, domain="forget", guard="none", kind="questions"):
    return {
        **{"guard": guard, "kind": kind, "domain": domain, "key": key, "id": 0},
        **{"log_prob_0": LN(0.25), "num_tokens_0": 1.0, "log_prob_1": LN(0.5), "num_tokens_1": 1.0},
    }


def test_reference_is_read_from_a_run(tmp_path):
    others = [item("c", "retain"), item("a", guard="on"), {**item("a"), "kind": "prompts"}]
    write_items(tmp_path, [item("b"), item("a"), *others])
    assert retained_ratios(str(tmp_path), 10, ["a", "b"]).tolist() == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize("keys", [["a"], ["a", "c"], ["a", "b", "c"]])
def test_reference_on_other_questions_is_refused(keys, tmp_path):
    write_items(tmp_path, [item("b"), item("a")])
    with pytest.raises(
        UserError, match=f"a run on the same {len(keys)} forget questions, got .* 2"
    ):
        retained_ratios(str(tmp_path), 10, keys)


def test_missing_reference_names_the_commands_that_make_it(tmp_path):
    for refused in (
        lambda: check_retained(None, 5),
        lambda: retained_ratios(str(tmp_path / "nothing"), 5, []),
    ):
        with pytest.raises(UserError) as caught:
            refused()
        assert "dsg fit -c configs/finetune/tofu_retrained.yaml --data.forget_percent 5" in str(
            caught.value
        )
        assert "--data.retained self --run_dir runs/tofu_retained_5" in str(caught.value)
    check_retained("self", 5)
