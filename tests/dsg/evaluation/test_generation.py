"""Continued prompts, against a loop over tokens."""

import pytest
import torch

from dsg.evaluation.collate import prompt_collate
from dsg.evaluation.gather import score_all
from dsg.evaluation.generation import UNUSED, said_text, score_prompts
from dsg.evaluation.items import Prompt
from dsg.evaluation.metrics import repeated_share
from dsg.evaluation.summary import summarise
from tests.dsg.evaluation.scoring_helpers import tiny_guard
from tests.dsg.evaluation.test_continuation import reference
from tests.helpers import EOS

NEW = 6
PROMPTS = [
    Prompt(i, "forget", text, "w1 w2 w3", max_new_tokens=NEW)
    for i, text in enumerate(["w3 w5 w10", "w3", "w16 w17 w18 w19 w2", "w7 w0"])
]


@pytest.mark.parametrize("guarded", [False, True])
@torch.no_grad()
def test_equals_a_loop_over_tokens(model, tokenizer, guarded):
    guard = tiny_guard(model, tokenizer, 0.3) if guarded else None
    batch = prompt_collate(tokenizer)(PROMPTS)
    values = score_prompts(model, batch, guard)
    assert values["density"].isnan().all() == (not guarded)
    for row, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt.text)["input_ids"]
        said = [token for token in reference(model, ids, guard) if token != EOS]
        assert values["generated"][row].tolist() == said + [UNUSED] * (NEW - len(said))
        assert values["num_tokens"][row] == len(said)
        table = model(torch.tensor([ids + said])).logits[0].double().log_softmax(-1)
        losses = [-table[len(ids) - 1 + i, token].item() for i, token in enumerate(said)]
        assert values["nll"][row].item() == pytest.approx(sum(losses) / len(said), abs=1e-5)


def test_batches_do_not_matter(model, tokenizer):
    collate, guard = prompt_collate(tokenizer), tiny_guard(model, tokenizer, 0.3)
    together = score_all(model, [collate(PROMPTS)], guard)
    apart = score_all(model, [collate([prompt]) for prompt in reversed(PROMPTS)], guard)
    assert together["triggered"].any()
    assert "generated" not in together
    for name, values in together.items():
        torch.testing.assert_close(values, apart[name], atol=1e-5, rtol=0)


def test_rouge_by_hand(model, tokenizer):
    # Said "w1 w9 w3" against "w1 w2 w3 w4": the longest common subsequence is "w1 w3".
    class Silent(type(model)):
        def generate(self, input_ids, **_):
            said = torch.tensor([tokenizer.convert_tokens_to_ids(["w1", "w9", "w3"])])
            return torch.cat([input_ids, said], dim=1)

    model.__class__ = Silent
    # The first of the five tokens is bos.
    batch = prompt_collate(tokenizer)(
        [Prompt(0, "forget", "w5", "w1 w2 w3 w4 w5 w6", 3, max_reference_tokens=5)]
    )
    assert batch.references == ["w1 w2 w3 w4"]
    values = score_prompts(model, batch)
    assert values["rouge_l"].item() == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert values["rouge_l_recall"].item() == pytest.approx(2 / 4)
    [prompts] = [[Prompt(0, "forget", "w5", "w1")]]
    found = {m.metric: m for m in summarise([], {}, [], {}, prompts=prompts, prompt_values=values)}
    assert found["rouge_l_recall"].value == pytest.approx(0.5)
    assert found["rouge_l"].protocol == "generation"


def test_text_ends_at_the_first_stop(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(["w1", "w2", "w3", "w4"])
    assert said_text(tokenizer, (), [*ids, UNUSED]) == "w1 w2 w3 w4"
    assert said_text(tokenizer, (" w4", " w3"), ids) == "w1 w2"
    assert said_text(tokenizer, ("w1",), ids) == ""


def test_repetition_by_hand():
    assert repeated_share([1, 2, 3]) == 0.0
    assert repeated_share([1, 2, 3, 4, 5]) == 0.0
    # Five runs of four tokens, all of them 7777.
    assert repeated_share([7] * 8) == pytest.approx(4 / 5)
    # 1231 2312 3123 1231 2312: three different ones of five.
    assert repeated_share([1, 2, 3, 1, 2, 3, 1, 2]) == pytest.approx(2 / 5)
