import math

import numpy as np
import pytest
import torch

from dsg.evaluation.benchmarks.mt_bench.conversations import COLUMNS, Conversation
from dsg.evaluation.benchmarks.mt_bench.scores import (
    answer_rows,
    item_rows,
    mean_over_repeats,
    measure_generations,
    measure_ratings,
)
from dsg.evaluation.items_file import read_items, write_items

NAN = math.nan
ASKED = [
    Conversation(0, "81", "writing", ("a", "b")),
    Conversation(1, "82", "math", ("c", "d")),
    Conversation(2, "x", "math", ("e", "f")),
]
# [conversation, turn, repeat]
RATINGS = np.array(
    [
        [[8.0, 6.0], [4.0, 4.0]],
        [[10.0, NAN], [NAN, NAN]],
        [[NAN, NAN], [NAN, NAN]],
    ]
)


def by_name(found):
    return {(one.domain, one.metric, one.protocol): one for one in found}


def test_ratings_by_hand():
    found = by_name(measure_ratings(ASKED, RATINGS, "stub"))
    # Turns with a rating: 7 and 4 of the first conversation, 10 of the second.
    score = found["mt_bench", "mt_bench", "stub"]
    assert (score.value, score.n) == (7.0, 2)
    assert score.low <= 7.0 <= score.high
    assert found["mt_bench", "mt_bench_turn_1", "stub"].value == 8.5
    assert found["mt_bench", "mt_bench_turn_1", "stub"].n == 2
    assert (found["mt_bench", "mt_bench_turn_2", "stub"].value, 1) == (4.0, 1)
    assert found["mt_bench", "mt_bench_turn_2", "stub"].low is None
    assert found["writing", "mt_bench", "stub"].value == 5.5
    assert found["math", "mt_bench", "stub"].value == 10.0
    # Repeats: (8 + 4 + 10) / 3 and (6 + 4) / 2, whose deviation is (22/3 - 5) / sqrt(2).
    spread = found["mt_bench", "mt_bench_repeat_sd", "stub"]
    assert (spread.value, spread.n) == (pytest.approx((22 / 3 - 5) / math.sqrt(2)), 2)
    failures = found["mt_bench", "judge_failures", "stub"]
    assert (failures.value, failures.n) == (7, 12)
    assert len(found) == 7


def test_a_judge_that_never_rated():
    [failures] = measure_ratings(ASKED, np.full((3, 2, 2), NAN), "stub")
    assert (failures.metric, failures.value, failures.n) == ("judge_failures", 12, 12)


def test_one_repeat_has_no_spread():
    found = measure_ratings(ASKED, np.full((3, 2, 1), 5.0), "stub")
    assert "mt_bench_repeat_sd" not in {one.metric for one in found}


def test_the_interval_resamples_conversations():
    """Two equal turns are no two observations."""
    rng = np.random.default_rng(0)
    ratings = np.repeat(rng.uniform(1, 10, (60, 1, 1)), 2, axis=1)
    asked = [Conversation(i, str(i), "writing", (f"{i}", "b")) for i in range(60)]
    score = by_name(measure_ratings(asked, ratings, "stub"))["mt_bench", "mt_bench", "stub"]
    half = 1.96 * ratings[:, 0, 0].std() / math.sqrt(60)
    assert score.high - score.low == pytest.approx(2 * half, rel=0.1)


def values(**columns):
    return {
        name: torch.tensor(columns.get(name, [0.0, 0.0, 0.0]), dtype=torch.float64)
        for name in COLUMNS
    }


def test_generations_by_hand():
    own = values(nll_turn_1=[0.5, 0.5, 0.5], nll_turn_2=[NAN, NAN, NAN])
    guarded = values(
        nll_turn_1=[0.1, 2.7, 2.9],  # the limit is 0.5 + log 10 = 2.803
        num_tokens_turn_1=[3.0, 8.0, 7.0],
        triggered_turn_1=[1.0, 1.0, 0.0],
        repetition_turn_2=[0.0, 0.3, 0.6],
    )
    found = by_name(measure_generations(guarded, own, guarded=True, max_new_tokens=8))
    assert found["mt_bench", "gibberish_rate", "turn_1"].value == pytest.approx(1 / 3)
    assert ("mt_bench", "gibberish_rate", "turn_2") not in found  # nothing to compare with
    assert found["mt_bench", "cut_off", "turn_1"].value == pytest.approx(1 / 3)
    assert found["mt_bench", "trigger_rate", "turn_1"].value == pytest.approx(2 / 3)
    assert found["mt_bench", "repetition", "turn_2"].value == pytest.approx(0.3)
    plain = by_name(measure_generations(own, own, guarded=False, max_new_tokens=8))
    assert not {metric for _, metric, _ in plain} & {"trigger_rate"}


def test_items(tmp_path):
    said = [("one", "two"), ("three", "four"), ("", "")]
    rows = item_rows("on", ASKED, said, values(nll_turn_1=[1.0, 2.0, NAN]), RATINGS)
    write_items(tmp_path, rows)
    first, second, third = read_items(tmp_path)
    assert (first["guard"], first["kind"], first["domain"]) == ("on", "conversations", "writing")
    assert (first["key"], first["text"], first["pool"]) == (ASKED[0].key, "one\n\ntwo", "mt_bench")
    assert (first["rating"], first["rating_turn_1"], first["nll_turn_1"]) == (5.5, 7.0, 1.0)
    assert second["rating_turn_1"] == 10.0
    assert math.isnan(second["rating"])
    assert math.isnan(third["rating_turn_2"])


def test_answers_in_the_published_format():
    first, *_, last = answer_rows("model", ASKED, [("one", "two")] * 3)
    assert (first["question_id"], last["question_id"]) == (81, "x")
    assert first["choices"] == [{"index": 0, "turns": ["one", "two"]}]


def test_mean_over_repeats():
    expected = [[7.0, 4.0], [10.0, NAN], [NAN, NAN]]
    np.testing.assert_array_equal(mean_over_repeats(RATINGS), expected)
