"""A batch that does not fit into memory is scored in pieces."""

import pytest
import torch

from dsg.evaluation.collate import passage_collate, prompt_collate, question_collate
from dsg.evaluation.gather import score
from dsg.evaluation.generation import score_prompts
from dsg.evaluation.items import Prompt
from dsg.evaluation.scoring import halving, score_passages, score_questions
from dsg.lm.tokens import auto_tokens, length_batches
from tests.dsg.evaluation.scoring_helpers import QUESTIONS, make_passages

PROMPTS = [Prompt(i, "retain", f"w{i} w3", "w1", 3) for i in range(5)]


@pytest.mark.parametrize(
    ("score_batch", "items", "make_collate"),
    [
        (score_questions, QUESTIONS, question_collate),
        (score_passages, make_passages(), passage_collate),
        (score_prompts, PROMPTS, prompt_collate),
    ],
)
def test_pieces_give_the_same_values(model, tokenizer, score_batch, items, make_collate):
    sizes = []

    def cramped(model, batch, guard=None):
        sizes.append(len(batch.ids))
        if len(batch.ids) > 2:
            raise torch.OutOfMemoryError("no room")
        return score_batch(model, batch, guard)

    batch = make_collate(tokenizer)(items)
    pieces, whole = halving(cramped)(model, batch), score(model, batch)
    assert sizes[0] == len(items)
    assert min(sizes) <= 2
    for name, values in whole.items():
        torch.testing.assert_close(pieces[name], values, atol=1e-5, rtol=0, equal_nan=True)


def test_one_item_that_does_not_fit_is_an_error(model, tokenizer):
    def full(*_):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        halving(full)(model, question_collate(tokenizer)(QUESTIONS[:3]))


def test_automatic_batches_hold_a_number_of_tokens():
    lengths = [auto_tokens() // 16] * 40 + [10] * 3 + [2 * auto_tokens()]
    batches = length_batches(lengths, "auto")
    assert sorted(index for batch in batches for index in batch) == list(range(44))
    padded = [len(batch) * max(lengths[index] for index in batch) for batch in batches]
    assert all(
        tokens <= auto_tokens() or len(batch) == 1
        for tokens, batch in zip(padded, batches, strict=True)
    )
    assert max(map(len, batches)) == 16
