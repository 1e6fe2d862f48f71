"""Min-K % and passages after a context, against one token at a time in float64."""

import pytest
import torch

from dsg.evaluation.collate import passage_collate
from dsg.evaluation.items import Passage
from dsg.evaluation.scoring import score_passages
from tests.dsg.evaluation.scoring_helpers import tiny_guard

PASSAGES = [
    Passage(0, "forget", "w1 w2 w3 w4 w5 w6 w7"),
    Passage(1, "forget", "w9 w8"),
    Passage(2, "forget", ""),
]
ANSWERS = [
    Passage(0, "forget", " w3 w4", context="w1 w2"),
    Passage(1, "forget", " w5", context="w9 w8 w7 w6"),
]


@torch.no_grad()
def losses_of(model, ids: list[int], start: int) -> list[float]:
    table = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [-table[i - 1, ids[i]].item() for i in range(start, len(ids))]


def test_min_k_by_sorting(model, tokenizer):
    values = score_passages(model, passage_collate(tokenizer)(PASSAGES))
    for row, passage in enumerate(PASSAGES[:2]):
        losses = sorted(losses_of(model, tokenizer(passage.text)["input_ids"], 1), reverse=True)
        count = max(1, int(0.4 * len(losses)))
        wanted = -sum(losses[:count]) / count
        assert values["min_k"][row].item() == pytest.approx(wanted, abs=1e-5)
    assert values["min_k"][2].isnan()


def test_a_context_is_read_but_not_scored(model, tokenizer):
    values = score_passages(model, passage_collate(tokenizer)(ANSWERS))
    assert values["num_tokens"].tolist() == [2, 1]
    for row, passage in enumerate(ANSWERS):
        ids = tokenizer(passage.context + passage.text)["input_ids"]
        start = len(tokenizer(passage.context)["input_ids"])
        wanted = sum(losses_of(model, ids, start))
        assert values["nll_sum"][row].item() == pytest.approx(wanted, abs=1e-5)


@torch.no_grad()
def test_the_context_is_the_guards_prompt(model, tokenizer):
    guard = tiny_guard(model, tokenizer, 0.3)
    values = score_passages(model, passage_collate(tokenizer)(ANSWERS), guard)
    assert values["triggered"].any()
    for row, passage in enumerate(ANSWERS):
        ids = torch.tensor([tokenizer(passage.context + passage.text)["input_ids"]])
        start = len(tokenizer(passage.context)["input_ids"])
        prompt_mask = torch.arange(ids.shape[1])[None] < start
        with guard.attached(model, decision="prompt") as attachment:
            table = model(ids, prompt_mask=prompt_mask).logits[0].double().log_softmax(-1)
        places = range(start, ids.shape[1])
        wanted = -sum(table[i - 1, ids[0, i]].item() for i in places)
        assert values["nll_sum"][row].item() == pytest.approx(wanted, abs=1e-5)
        assert values["triggered"][row].item() == attachment.triggered.item()
