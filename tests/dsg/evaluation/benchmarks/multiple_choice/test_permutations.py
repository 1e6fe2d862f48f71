"""The rules of the question filter on outcomes that are known."""

import math

import pytest

from dsg.evaluation.benchmarks.multiple_choice.permutations import (
    ORDERS,
    RULES,
    VARIANTS,
    has_trick,
    kept_rows,
    reordered,
    variant,
)
from dsg.evaluation.benchmarks.multiple_choice.prompts import ChoiceRow
from tests.choice_data import choice_rows, choice_tokenizer


def test_all_orders_the_given_one_first():
    assert len(set(ORDERS)) == math.factorial(4)
    assert ORDERS[0] == (0, 1, 2, 3)
    assert VARIANTS == 48


@pytest.mark.parametrize("order", ORDERS)
def test_the_right_choice_stays_right(order):
    for row in choice_rows(4):
        moved = reordered(row, order)
        assert moved.choices[moved.answer] == row.choices[row.answer]
        assert moved.choices == tuple(row.choices[place] for place in order)
        assert moved.key == row.key


def test_variants_ask_in_every_order_and_then_without_the_question():
    [row] = choice_rows(1)
    made = [variant(row, n, "dsg", choice_tokenizer(), id=n) for n in range(VARIANTS)]
    assert [question.id for question in made] == list(range(VARIANTS))
    assert len({question.prompt for question in made}) == VARIANTS
    assert [row.question in question.prompt for question in made] == [True] * 24 + [False] * 24
    assert [q.answer for q in made[:24]] == [q.answer for q in made[24:]]


@pytest.mark.parametrize(
    ("choice", "trick"),
    [
        ("A and B", True),
        ("Both C & D", True),
        ("All of the above", True),
        ("None of the above", False),
        ("A and E", False),
        ("vitamins A and B", False),
        ("A and B only", False),
    ],
)
def test_tricks(choice, trick):
    assert has_trick(ChoiceRow("s", "q", ("x", "y", choice, "z"), 0)) == trick


def test_rules():
    rows = choice_rows(5)
    rows[3] = ChoiceRow("toy", "w1", ("w1", "w2", "w3", "A and B"), 0, "tricky")
    outcomes = {id: True for id in range(5 * VARIANTS)}
    outcomes[0 * VARIANTS + 23] = False  # one order wrong
    outcomes[1 * VARIANTS + 24] = False  # without the question one order wrong
    outcomes |= {2 * VARIANTS + number: False for number in range(24, 48)}
    kept = kept_rows(rows, outcomes)
    assert list(kept) == list(RULES)
    assert kept["correct"] == [rows[1], rows[2], rows[3], rows[4]]
    assert kept["correct_iff_question"] == [rows[1], rows[2]]
    assert kept["no_tricks"] == [rows[1], rows[2], rows[4]]
