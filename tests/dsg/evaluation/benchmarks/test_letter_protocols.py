"""The rules by which options become an answer, against one sequence at a time."""

import math

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dsg.errors import UserError
from dsg.evaluation.collate import encode_question, question_collate
from dsg.evaluation.gather import score_all
from dsg.evaluation.items import Question
from dsg.evaluation.scoring import question_columns, score_questions
from dsg.evaluation.summary import summarise
from tests.dsg.evaluation.scoring_helpers import tiny_guard

LETTERS = (" w0", " w1", " w2", " w3")
PAIRS = (" w0", " w4", " w1", " w5", " w2", " w6", " w3", " w7")
PROMPTS = ("w9 w8 w7", "w20", "w11 w12 w13 w14 w15 w16", "w5 w9")


def questions(protocol: str, options: tuple[str, ...]) -> list[Question]:
    return [
        Question(i, "retain", None, prompt, options, i % 4, protocol=protocol)
        for i, prompt in enumerate(PROMPTS)
    ]


@torch.no_grad()
def log_probs_of(model, tokenizer, question: Question) -> list[float]:
    """Summed log-probability of each option, without padding, cache or batch."""
    found = []
    for option in question.options:
        start = len(tokenizer(question.prompt)["input_ids"])
        ids = tokenizer(question.prompt + option)["input_ids"]
        table = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append(sum(table[i - 1, ids[i]].item() for i in range(start, len(ids))))
    return found


def softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


@pytest.mark.parametrize("protocol", ["lm_eval", "dsg", "cloze"])
def test_every_rule_against_one_sequence_at_a_time(model, tokenizer, protocol):
    options = {
        "lm_eval": LETTERS,
        "dsg": PAIRS,
        "cloze": (" w0", " w1 w2", " w2 w13 w14", " w3 w15"),
    }[protocol]
    asked = questions(protocol, options)
    values = score_questions(model, question_collate(tokenizer)(asked))
    assert set(values) == set(question_columns(4))
    for row, question in enumerate(asked):
        sums = log_probs_of(model, tokenizer, question)
        words = [len(option.split()) for option in options]
        chars = [len(option) - 1 for option in options]
        if protocol == "dsg":
            sums = [max(sums[2 * place], sums[2 * place + 1]) for place in range(4)]
            words, chars = words[::2], chars[::2]
        scores = [s / w for s, w in zip(sums, words, strict=True)] if protocol == "cloze" else sums
        by_chars = [s / c for s, c in zip(sums, chars, strict=True)]
        expected = {
            "chosen": scores.index(max(scores)),
            "correct": float(scores.index(max(scores)) == question.answer),
            "correct_plain": float(sums.index(max(sums)) == question.answer),
            "correct_chars": float(by_chars.index(max(by_chars)) == question.answer),
            "correct_probability": softmax(scores)[question.answer],
        }
        expected |= {f"log_prob_{place}": one for place, one in enumerate(sums)}
        expected |= {f"num_tokens_{place}": count for place, count in enumerate(words)}
        for name, wanted in expected.items():
            assert values[name][row].item() == pytest.approx(wanted, abs=1e-5), name


def test_letters_need_one_pass_and_one_row_of_logits(model, tokenizer, monkeypatch):
    shapes = []
    forward = model.lm_head.forward

    def counted(hidden):
        shapes.append(tuple(hidden.shape[:2]))
        return forward(hidden)

    monkeypatch.setattr(model.lm_head, "forward", counted)
    score_questions(model, question_collate(tokenizer)(questions("dsg", PAIRS)))
    assert shapes == [(len(PROMPTS), 1)]


@pytest.mark.parametrize(("protocol", "options"), [("lm_eval", LETTERS), ("dsg", PAIRS)])
def test_batches_and_padding_do_not_matter(model, tokenizer, protocol, options):
    collate, guard = question_collate(tokenizer), tiny_guard(model, tokenizer, 0.3)
    asked = questions(protocol, options)
    together = score_all(model, [collate(asked)], guard)
    apart = score_all(model, [collate([question]) for question in reversed(asked)], guard)
    assert torch.equal(together["triggered"], apart["triggered"])
    assert together["triggered"].any()
    for name, values in together.items():
        torch.testing.assert_close(values, apart[name], atol=1e-5, rtol=0)


def test_pools_letters_and_the_flag_are_reported():
    asked = [
        Question(i, f"subject_{i % 2}", None, "w1", LETTERS, 0, protocol="lm_eval", pool="retain")
        for i in range(40)
    ]
    wrong = torch.zeros(40, dtype=torch.float64)
    values = {
        "correct": wrong,
        "correct_probability": torch.full_like(wrong, 0.1),
        "margin": torch.ones_like(wrong),
        "chosen": torch.ones_like(wrong),
        "density": torch.full_like(wrong, torch.nan),
    }
    found = {(m.domain, m.metric): m for m in summarise(asked, values, [], {})}
    assert {domain for domain, _ in found} == {"subject_0", "subject_1", "retain"}
    assert found["retain", "accuracy"].n == 40
    assert found["subject_1", "accuracy"].n == 20
    assert found["retain", "below_chance"].value == 1.0
    assert found["retain", "correct_probability"].value == pytest.approx(0.1)
    assert [found["retain", f"chosen_{place}"].value for place in range(4)] == [0, 1, 0, 0]
    assert {m.protocol for m in found.values()} == {"lm_eval"}


def test_shown_questions_of_a_forget_pool_are_reported_apart():
    asked = [
        Question(i, "set", None, "w1", LETTERS, 0, i == 0, protocol="lm_eval", pool="forget")
        for i in range(3)
    ]
    right = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    values = {
        "correct": right,
        "correct_probability": right,
        "margin": torch.ones_like(right),
        "chosen": torch.zeros_like(right),
        "density": torch.full_like(right, torch.nan),
    }
    found = {(m.domain, m.metric): m for m in summarise(asked, values, [], {})}
    shown, unshown = found["forget_shown", "accuracy"], found["forget_unshown", "accuracy"]
    assert ((shown.value, shown.n), (unshown.value, unshown.n)) == ((1.0, 1), (0.0, 2))


def test_a_second_bos_is_refused(tokenizer):
    question = Question(0, "retain", None, "w1 <bos> w2", LETTERS, 0, protocol="lm_eval")
    with pytest.raises(UserError, match="at most one bos token '<bos>', got 2"):
        encode_question(tokenizer, question)


def test_letters_keep_tokens_of_their_own():
    letters = ["A", " A", "B", " B"]
    vocab = {token: index for index, token in enumerate(["<unk>", "(", " ", "A", "B", "(A", " A"])}
    bpe = Tokenizer(models.BPE(vocab, [("(", "A"), (" ", "A")], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")
    assert tokenizer("(A")["input_ids"] == [vocab["(A"]]
    question = Question(0, "retain", None, "(", tuple(letters), 0, protocol="dsg")
    assert encode_question(tokenizer, question) == (1, [[1, 3], [1, 6], [1, 4], [1, 2, 4]])
