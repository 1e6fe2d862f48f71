"""Numbers of a model that has diverged end what would take them for forgetting."""

import pytest
import torch

from dsg.errors import UserError
from dsg.evaluation.collate import passage_collate, prompt_collate, question_collate
from dsg.evaluation.gather import score
from dsg.evaluation.generation import greedy_continuation
from dsg.evaluation.items import Prompt
from dsg.lm.finite import check_weights, finite_loss
from dsg.lm.tokens import pad_sequences
from tests.dsg.evaluation.scoring_helpers import make_passages, make_questions, tiny_guard
from tests.helpers import PAD

PROMPTS = [Prompt(0, "forget", "w1 w2", "w3", 3), Prompt(1, "retain", "w4 w5 w6", "w7", 3)]
SAID = "must be finite, got nan or inf: its weights are damaged, or were trained until they"


def batches(tokenizer):
    return {
        "questions": question_collate(tokenizer)(make_questions(4)),
        "passages": passage_collate(tokenizer)(make_passages(4)),
        "prompts": prompt_collate(tokenizer)(PROMPTS),
    }


# The last weights, so that a guard, which looks at activations in the middle, sees nothing.
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("kind", ["questions", "passages", "prompts"])
def test_logits_that_are_no_numbers_are_not_scored(model, tokenizer, kind, guarded, number):
    guard = tiny_guard(model, tokenizer, 0.3) if guarded else None
    batch = batches(tokenizer)[kind]
    score(model, batch, guard)
    model.lm_head.weight.data[:, 0] = number
    with pytest.raises(UserError, match=SAID):
        score(model, batch, guard)


def test_logits_that_are_no_numbers_are_not_generated_from(model):
    prompts = pad_sequences([[4, 5], [6]], PAD, [PAD], side="left")
    greedy_continuation(model, prompts, 2, PAD)
    model.lm_head.weight.data[7, 0] = torch.nan
    with pytest.raises(UserError, match=f"the model's logits {SAID}"):
        greedy_continuation(model, prompts, 2, PAD)


def test_tokens_that_a_model_masks_are_no_damage(model, tokenizer):
    """`-inf` for a token that nobody asks about."""
    asked = batches(tokenizer)
    handle = model.lm_head.register_forward_hook(
        lambda _, __, logits: logits.index_fill(-1, torch.tensor([PAD]), -torch.inf)
    )
    for batch in asked.values():
        score(model, batch)
    handle.remove()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_must_be_a_number(number):
    assert finite_loss(torch.tensor(3e38), 0) == 3e38
    with pytest.raises(UserError, match=f"got {number} after 7 optimizer steps: training has"):
        finite_loss(torch.tensor(number), 7)


def test_weights_must_be_numbers(model):
    check_weights(model)
    model.model.layers[1].mlp.up_proj.weight.data[2, 3] = torch.inf
    with pytest.raises(UserError, match=r"nan or inf in model\.layers\.1\.mlp\.up_proj\.weight"):
        check_weights(model)
