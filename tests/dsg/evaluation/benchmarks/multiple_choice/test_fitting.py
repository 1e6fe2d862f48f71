"""Prompts that are too long are refused, or cut on the left as little as needed."""

import pytest

from dsg.errors import UserError
from dsg.evaluation.benchmarks.multiple_choice.fitting import fit_question
from dsg.evaluation.collate import encode_question
from dsg.evaluation.items import Question
from tests.helpers import BOS, tiny_tokenizer

QUESTION = Question(0, "toy", None, "w1 w2 w3 w4 w5", (" w6 w7", " w8"), 0, key="abc")  # 1 + 5 + 2


@pytest.mark.parametrize("max_length", [None, 8, 100])
def test_what_fits_is_left_alone(max_length):
    for allow in (False, True):
        fitting = fit_question(tiny_tokenizer(), QUESTION, max_length, allow_truncation=allow)
        assert fitting is QUESTION


def test_too_long_a_prompt_is_refused():
    with pytest.raises(UserError, match=r"fit into 7 tokens, but question abc of 'toy' has 8"):
        fit_question(tiny_tokenizer(), QUESTION, 7, allow_truncation=False)


@pytest.mark.parametrize("max_length", [4, 5, 6, 7])
def test_the_beginning_is_cut_but_not_the_bos(max_length):
    tokenizer = tiny_tokenizer()
    fitting = fit_question(tokenizer, QUESTION, max_length, allow_truncation=True)
    num_prompt, rows = encode_question(tokenizer, fitting)
    whole = encode_question(tokenizer, QUESTION)[1]
    kept = max_length - 1
    assert rows[0] == [BOS, *whole[0][-kept:]]
    assert num_prompt == max_length - 2
    assert fitting.options == QUESTION.options


def test_options_that_leave_no_room_are_refused():
    with pytest.raises(UserError, match=r"leave no room for its prompt, .* 5 of 5 tokens"):
        fit_question(tiny_tokenizer(), QUESTION, 3, allow_truncation=True)
