import math
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dsg.errors import UserError
from dsg.evaluation.collate import encode_question, passage_collate, question_collate
from dsg.evaluation.items import Passage, Question
from dsg.evaluation.scoring import score_passages, score_questions
from tests.dsg.evaluation.scoring_helpers import QUESTIONS, tiny_guard
from tests.helpers import BOS, EOS

PASSAGES = [
    Passage(0, "retain", "w1 w2 w3 w4 w5"),
    Passage(1, "forget", "w9 w8"),
    Passage(2, "forget", ""),
]


def reference_log_probs(model, ids: list[int]) -> list[float]:
    """Log-probability of every token but the first, one sequence at a time, in float64."""
    log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [log_probs[place, token].item() for place, token in enumerate(ids[1:])]


def reference_scores(model, tokenizer, question: Question) -> list[float]:
    scores = []
    num_prompt = len(tokenizer(question.prompt)["input_ids"])
    for option in question.options:
        ids = tokenizer(question.prompt + option)["input_ids"]
        option_log_probs = reference_log_probs(model, ids)[num_prompt - 1 :]
        scores.append(sum(option_log_probs) / len(option_log_probs))
    return scores


def test_cloze_scores_match_one_sequence_at_a_time(model, tokenizer):
    values = score_questions(model, question_collate(tokenizer)(QUESTIONS))
    for row, question in enumerate(QUESTIONS):
        scores = reference_scores(model, tokenizer, question)
        right = scores[question.answer]
        best_wrong = max(s for i, s in enumerate(scores) if i != question.answer)
        total = sum(math.exp(s) for s in scores)
        assert values["margin"][row].item() == pytest.approx(right - best_wrong, abs=1e-5)
        assert values["correct"][row].item() == float(right > best_wrong)
        assert values["correct_probability"][row].item() == pytest.approx(
            math.exp(right) / total, abs=1e-5
        )
    assert values["triggered"].isnan().all()
    assert values["density"].isnan().all()
    assert all(column.dtype == torch.float64 for column in values.values())


def test_some_questions_are_right_and_some_wrong(model, tokenizer):
    correct = score_questions(model, question_collate(tokenizer)(QUESTIONS))["correct"]
    assert 0 < correct.sum() < len(QUESTIONS)


def test_batching_and_padding_leave_answers_alone(model, tokenizer):
    collate = question_collate(tokenizer)
    together = score_questions(model, collate(QUESTIONS))
    for row, question in enumerate(QUESTIONS):
        alone = score_questions(model, collate([question]))
        for name in ("correct", "correct_probability", "margin"):
            assert alone[name].item() == pytest.approx(together[name][row].item(), abs=1e-5)


def test_passage_losses_match_one_sequence_at_a_time(model, tokenizer):
    values = score_passages(model, passage_collate(tokenizer)(PASSAGES))
    for row, passage in enumerate(PASSAGES):
        log_probs = reference_log_probs(model, tokenizer(passage.text)["input_ids"])
        assert values["nll_sum"][row].item() == pytest.approx(-sum(log_probs), abs=1e-4)
        assert values["num_tokens"][row].item() == len(log_probs)


def test_the_closing_token_is_scored_where_it_is_asked_for(model, tokenizer):
    """As in TOFU's published code: the mean is over the answer's tokens and eos."""
    passage = Passage(0, "forget", " w3 w4", context="w1 w2", closed=True)
    longer = Passage(1, "forget", " w3 w4 w5 w6", context="w1 w2")
    values = score_passages(model, passage_collate(tokenizer)([passage, longer]))
    expected = reference_log_probs(model, [*tokenizer("w1 w2 w3 w4")["input_ids"], EOS])[-3:]
    assert values["nll_sum"][0].item() == pytest.approx(-sum(expected), abs=1e-4)
    assert values["num_tokens"].tolist() == [3.0, 4.0]
    question = Question(0, "forget", None, "w1 w2", (" w3 w4", " w5 w6 w7"), 0, closed=True)
    values = score_questions(model, question_collate(tokenizer)([question]))
    assert values["log_prob_0"].item() == pytest.approx(sum(expected), abs=1e-4)
    assert [values[f"num_tokens_{place}"].item() for place in (0, 1)] == [3.0, 4.0]


def test_the_closing_token_does_not_change_a_decision(model, tokenizer):
    guard = tiny_guard(model, tokenizer, 0.3)
    for context in ("", "w1 w2"):
        passages = [replace(p, text=f" {p.text}", context=context) for p in PASSAGES[:2]]
        without, with_end = (
            score_passages(model, passage_collate(tokenizer)(of), guard)
            for of in (passages, [replace(p, closed=True) for p in passages])
        )
        assert torch.equal(without["density"], with_end["density"])
        assert torch.equal(without["num_tokens"] + 1, with_end["num_tokens"])
        assert (with_end["nll_sum"] > without["nll_sum"]).all()


def test_passages_are_cut(tokenizer):
    batch = passage_collate(tokenizer, max_length=3)(PASSAGES)
    assert batch.tokens.input_ids.shape == (3, 3)


def test_the_prompt_alone_decides_for_all_options(model, tokenizer):
    guard = tiny_guard(model, tokenizer, threshold=0.5)
    values = score_questions(model, question_collate(tokenizer)(QUESTIONS), guard)
    for row, question in enumerate(QUESTIONS):
        ids = torch.tensor([tokenizer(question.prompt)["input_ids"]])
        density = guard.density(model, ids).item()
        assert values["density"][row].item() == pytest.approx(density)
        assert values["triggered"][row].item() == float(density > 0.5)
    assert 0 < values["triggered"].sum() < len(QUESTIONS)


def test_untriggered_questions_are_bit_identical_and_triggered_ones_change(model, tokenizer):
    guard = tiny_guard(model, tokenizer, threshold=0.5)
    batch = question_collate(tokenizer)(QUESTIONS)
    on, off = score_questions(model, batch, guard), score_questions(model, batch)
    same = on["margin"] == off["margin"]
    assert torch.equal(same, on["triggered"] == 0)


def test_whole_passages_decide(model, tokenizer):
    guard = tiny_guard(model, tokenizer, threshold=0.5)
    batch = passage_collate(tokenizer)(PASSAGES)
    values = score_passages(model, batch, guard)
    density = guard.density(model, **batch.tokens.model_inputs()).double()
    torch.testing.assert_close(values["density"], density)
    assert torch.equal(values["triggered"], (density > 0.5).double())


def subword_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair merges that cross the border between prompt and option."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = ["it is a pool", "it is a poor", "it is a pond"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_the_shared_tokens_are_the_prompt_where_merges_cross_the_border():
    tokenizer = subword_tokenizer()
    question = Question(0, "forget", "statement", "it is a p", ("ool", "oor", "ond"), 0)
    num_prompt, rows = encode_question(tokenizer, question)
    assert len({tuple(row[:num_prompt]) for row in rows}) == 1
    assert num_prompt < len(tokenizer("it is a p")["input_ids"])
    texts = [question.prompt + option for option in question.options]
    assert rows == tokenizer(texts)["input_ids"]


def test_collate_parts_prompts_from_options(tokenizer):
    question = Question(7, "retain", "question", "w1 w2", (" w3", " w4 w5"), 1)
    batch = question_collate(tokenizer)([question])
    assert batch.prompts.input_ids.tolist() == [[BOS, 5, 6]]
    assert batch.options.input_ids.tolist() == [[7, 0], [8, 9]]
    assert batch.options.token_mask.int().tolist() == [[1, 0], [1, 1]]
    assert (batch.ids.tolist(), batch.answers.tolist(), batch.num_options) == ([7], [1], 2)
    assert torch.equal(batch.to("cpu").options.input_ids, batch.options.input_ids)


@pytest.mark.parametrize("option", ["", " "])
def test_an_option_without_a_token(tokenizer, option):
    question = Question(3, "retain", "question", "w1", (" w2", option), 0)
    with pytest.raises(UserError, match="Question 3 needs a prompt and options that each add"):
        question_collate(tokenizer)([question])


def test_questions_with_different_numbers_of_options(tokenizer):
    questions = [
        Question(0, "retain", "question", "w1", (" w2", " w3"), 0),
        Question(1, "retain", "question", "w1", (" w2", " w3", " w4"), 0),
    ]
    with pytest.raises(UserError, match=r"got \[\('cloze', 2\), \('cloze', 3\)\]"):
        question_collate(tokenizer)(questions)
