"""The papers' question filter: which questions a model answers whatever the order of the choices.

Every question is asked in all orders of its choices, and in all orders without the question.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from dsg.evaluation.benchmarks.multiple_choice.prompts import LETTERS, ChoiceRow, make_question
from dsg.evaluation.items import Protocol, Question

Rule = Literal["correct", "correct_iff_question", "no_tricks"]
RULES: tuple[Rule, ...] = get_args(Rule)

ORDERS = tuple(itertools.permutations(range(len(LETTERS))))
VARIANTS = 2 * len(ORDERS)  # of a question: with it, then without it

# A choice that refers to the others means something else in another order.
_REFERS_TO_OTHERS = re.compile(r"(Both )?[ABCD] (and|&) [ABCD]|All of the above")


def reordered(row: ChoiceRow, order: Sequence[int]) -> ChoiceRow:
    """The same question with its choices in another order.

    Args:
        row: The question.
        order: Index of the choice that comes first, second, ...
    """
    first, second, third, fourth = (row.choices[index] for index in order)
    answer = list(order).index(row.answer)
    return replace(row, choices=(first, second, third, fourth), answer=answer)


def variant(
    row: ChoiceRow, number: int, protocol: Protocol, tokenizer: Any, *, id: int
) -> Question:
    """One of the `VARIANTS` of a question.

    Args:
        row: The question.
        number: The order's place in `ORDERS`; `len(ORDERS)` more without the question.
        protocol: How it is asked.
        tokenizer: See `make_question`.
        id: Unique among the questions that are scored together.
    """
    asked, order = number < len(ORDERS), ORDERS[number % len(ORDERS)]
    return make_question(protocol, reordered(row, order), tokenizer, id=id, asked=asked)


def has_trick(row: ChoiceRow) -> bool:
    """Whether a choice refers to others by their letters (`Both A and B`), or to all of them.

    Exactly these forms are recognised, with these capitals: `A and B`, `A & B`, the same after
    `Both`, and `All of the above`.
    """
    return any(_REFERS_TO_OTHERS.fullmatch(choice) for choice in row.choices)


def kept_rows(
    rows: Sequence[ChoiceRow], correct: Mapping[int, bool]
) -> dict[Rule, list[ChoiceRow]]:
    """The questions that each rule keeps, in the given order.

    - `correct`: answered correctly in all 24 orders.
    - `correct_iff_question`: `correct`, but without the question not so in all 24 orders.
    - `no_tricks`: `correct`, and no choice refers to others by letter (see `has_trick`).

    Args:
        rows: The questions.
        correct: Whether variant `v` of question `i` was answered correctly, at `VARIANTS * i + v`.
    """
    kept: dict[Rule, list[ChoiceRow]] = {rule: [] for rule in RULES}
    for place, row in enumerate(rows):
        outcomes = [correct[VARIANTS * place + number] for number in range(VARIANTS)]
        if not all(outcomes[: len(ORDERS)]):
            continue
        kept["correct"].append(row)
        if not all(outcomes[len(ORDERS) :]):
            kept["correct_iff_question"].append(row)
        if not has_trick(row):
            kept["no_tricks"].append(row)
    return kept
