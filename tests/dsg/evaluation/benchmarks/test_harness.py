"""A guarded model in the real lm-evaluation-harness, request by request."""

import importlib
import sys

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from dsg.errors import UserError
from dsg.evaluation.benchmarks.harness import GuardedLM
from dsg.guard.guard import GuardStack
from tests.guard_reference import greedy, make_guard, reference
from tests.helpers import EOS, standard_sae, tiny_model, tiny_tokenizer

MODEL = tiny_model(attn_implementation="sdpa").double()
SAE = standard_sae(dtype="float64")
# About half of the requests below are triggered.
GUARD = make_guard(SAE, [1, 12], threshold=0.45, value=-9.0)
NEVER, ALWAYS = GUARD.replace(threshold=1.0), GUARD.replace(threshold=0.0)
NEW_TOKENS = 6


def words(count: int, seed: int) -> str:
    ids = torch.randint(26, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in ids.tolist())


# Four continuations of each context, of one to three words; those of one word share a pass.
CONTEXTS = [words(1 + n % 9, seed=n) for n in range(16)]
PAIRS = [
    (context, " " + words(1 + place * (n % 3 > 0) % 3, seed=100 + 4 * n + place))
    for n, context in enumerate(CONTEXTS)
    for place in range(4)
]
TEXTS = [(words(2 + n % 8, seed=200 + n),) for n in range(15)]
PROMPTS = [
    (
        words(1 + n % 9, seed=300 + n),
        {"until": [["w24", "w14"], []][n % 2], "max_gen_toks": NEW_TOKENS},
    )
    for n in range(40)
]
ALL = {"loglikelihood": PAIRS, "loglikelihood_rolling": TEXTS, "generate_until": PROMPTS}


def ask(lm, kind, arguments):
    requests = [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]
    return getattr(lm, kind)(requests, disable_tqdm=True)


def guarded_lm(guard=GUARD, **options) -> GuardedLM:
    return GuardedLM(MODEL, tiny_tokenizer(), guard, **{"batch_size": 5, **options})


def plain_lm(**options) -> HFLM:
    return HFLM(MODEL, tokenizer=tiny_tokenizer(), **{"batch_size": 5, **options})


def ids_of(text: str) -> list[int]:
    return tiny_tokenizer()(text)["input_ids"]


def expected_pair(guard, context_ids, rest_ids) -> tuple[float, bool, bool]:
    """Log-probability, greediness and decision of one continuation, by the reference."""
    truth = reference(MODEL, SAE, guard, context_ids + rest_ids, len(context_ids), running=False)
    rows = truth.logits[len(context_ids) - 1 : -1].log_softmax(-1)
    total = sum(float(row[token]) for row, token in zip(rows, rest_ids, strict=True))
    return total, rows.argmax(-1).tolist() == rest_ids, truth.triggered[0]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("guard", [None, NEVER])
def test_what_is_not_guarded_or_triggered_is_the_plain_harness_to_the_last_bit(kind, guard):
    assert ask(guarded_lm(guard), kind, ALL[kind]) == ask(plain_lm(), kind, ALL[kind])


def test_the_context_of_each_request_decides_for_its_continuation():
    found = ask(guarded_lm(), "loglikelihood", PAIRS)
    plain = ask(plain_lm(), "loglikelihood", PAIRS)
    decisions = []
    for (context, rest), got, unguarded in zip(PAIRS, found, plain, strict=True):
        ids = ids_of(context)
        total, is_greedy, triggered = expected_pair(GUARD, ids, ids_of(context + rest)[len(ids) :])
        assert got[0] == pytest.approx(total, abs=1e-9)
        assert got[1] is is_greedy
        # Whatever else was in its batch.
        assert (got == unguarded) is not triggered
        decisions.append(triggered)
    by_question = [decisions[start : start + 4] for start in range(0, len(decisions), 4)]
    assert all(len(set(options)) == 1 for options in by_question)
    assert 10 < sum(decisions) < len(decisions) - 10


def test_all_of_a_rolling_text_decides():
    found = ask(guarded_lm(), "loglikelihood_rolling", TEXTS)
    decisions = []
    for (text,), got in zip(TEXTS, found, strict=True):
        # The harness puts a bos token before that of the tokenizer, and does not read the last one.
        ids = [2, *ids_of(text)]
        truth = reference(MODEL, SAE, GUARD, ids[:-1])
        rows = truth.logits.log_softmax(-1)
        total = sum(float(row[token]) for row, token in zip(rows, ids[1:], strict=True))
        assert got == pytest.approx(total, abs=1e-9)
        decisions.append(truth.triggered[0])
    assert 3 < sum(decisions) < len(decisions) - 3


def test_generation_is_that_of_the_reference_cut_at_the_stop_strings():
    found = ask(guarded_lm(), "generate_until", PROMPTS)
    tokenizer, midway, stopped = tiny_tokenizer(), 0, 0
    for (prompt, options), got in zip(PROMPTS, found, strict=True):
        new, turned_on = greedy(MODEL, SAE, GUARD, ids_of(prompt), NEW_TOKENS, EOS)
        text = tokenizer.decode(new, skip_special_tokens=True)
        for stop in options["until"]:
            stopped += stop in text
            text = text.split(stop)[0]
        assert got == text
        midway += turned_on
    assert midway > 3
    assert stopped > 3


@pytest.mark.parametrize("kind", ALL)
def test_batches_change_nothing(kind):
    wanted = ask(guarded_lm(batch_size=1), kind, ALL[kind])
    for size in (3, 64, "auto"):
        for step in (1, -1):
            found = ask(guarded_lm(batch_size=size), kind, ALL[kind][::step])[::step]
            for got, want in zip(found, wanted, strict=True):
                assert got == (want if isinstance(want, str) else pytest.approx(want, abs=1e-9))


def test_the_same_text_divided_elsewhere_is_decided_elsewhere():
    text = words(9, seed=7).split()
    pairs = [(" ".join(text[:n]), " " + " ".join(text[n:])) for n in range(1, 9)]
    found = ask(guarded_lm(), "loglikelihood", pairs)
    decisions = set()
    for (context, _), got in zip(pairs, found, strict=True):
        ids, n = ids_of(" ".join(text)), len(ids_of(context))
        total, _, triggered = expected_pair(GUARD, ids[:n], ids[n:])
        assert got[0] == pytest.approx(total, abs=1e-9)
        decisions.add(triggered)
    assert decisions == {True, False}


def test_a_context_that_is_cut_decides_as_it_was_cut(caplog):
    limit = 7
    found = ask(guarded_lm(max_length=limit), "loglikelihood", PAIRS)
    assert found != ask(guarded_lm(), "loglikelihood", PAIRS)
    for (context, rest), got in zip(PAIRS, found, strict=True):
        whole = ids_of(context + rest)
        num_rest = len(whole) - len(ids_of(context))
        kept = whole[-(limit + 1) :]
        total, _, _ = expected_pair(GUARD, kept[:-num_rest], kept[-num_rest:])
        assert got[0] == pytest.approx(total, abs=1e-9)
    assert "requests are longer than the model's 7 tokens" in caplog.text
    plain = ask(plain_lm(max_length=limit), "loglikelihood", PAIRS)
    assert ask(guarded_lm(NEVER, max_length=limit), "loglikelihood", PAIRS) == plain


def test_a_long_text_is_decided_window_by_window():
    text = words(20, seed=11)
    got = ask(guarded_lm(max_length=6), "loglikelihood_rolling", [(text,)])[0]
    ids = [2, *ids_of(text)]
    total, decisions = 0.0, set()
    for start in range(0, len(ids) - 1, 6):
        new = ids[start + 1 : start + 7]
        end = start + len(new)
        # The last window begins earlier, so that it is as long as the others.
        truth = reference(MODEL, SAE, GUARD, ids[end - 6 : end])
        rows = truth.logits[-len(new) :].log_softmax(-1)
        total += sum(float(row[token]) for row, token in zip(rows, new, strict=True))
        decisions.add(truth.triggered[0])
    assert got == pytest.approx(total, abs=1e-9)
    assert decisions == {True, False}


def test_a_request_without_a_context_is_never_triggered():
    pairs = [("", words(3, seed=n)) for n in range(4)]
    found = ask(guarded_lm(ALWAYS), "loglikelihood", pairs)
    assert found == ask(plain_lm(), "loglikelihood", pairs)


def test_a_bos_token_in_one_prompt_adds_none_to_the_others():
    prompts = [
        ("<bos> w1 w2 w3 w4 w5", {"until": [], "max_gen_toks": 4}),
        ("w1 w2 w3", {"until": [], "max_gen_toks": 4}),
    ]
    alone = [ask(plain_lm(), "generate_until", [prompt])[0] for prompt in prompts]
    for step in (1, -1):
        found = ask(guarded_lm(None), "generate_until", prompts[::step])
        assert found[::step] == alone


def test_a_stack_of_guards_and_an_adapter_are_guarded():
    from peft import LoraConfig, get_peft_model

    stack = GuardStack([GUARD, make_guard(SAE, [5], threshold=0.3)])
    found = ask(guarded_lm(stack), "loglikelihood", PAIRS)
    assert found != ask(guarded_lm(), "loglikelihood", PAIRS)
    wrapped = get_peft_model(
        tiny_model(attn_implementation="sdpa").double(), LoraConfig(target_modules=["q_proj"])
    )
    lm = GuardedLM(wrapped, tiny_tokenizer(), GUARD, batch_size=5)
    for kind, given in ALL.items():
        assert ask(lm, kind, given) == ask(guarded_lm(), kind, given)


def test_the_model_is_left_as_it_was():
    lm = guarded_lm(ALWAYS)
    before = ask(plain_lm(), "loglikelihood", PAIRS)
    for kind, given in ALL.items():
        ask(lm, kind, given)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in MODEL.modules())
    assert ask(plain_lm(), "loglikelihood", PAIRS) == before


def test_impossible_continuations_are_refused():
    with pytest.raises(UserError, match=r"1 to 3 tokens.* got 0 without any and a longest of 4"):
        ask(guarded_lm(max_length=3), "loglikelihood", [("w1", " w2 w3 w4 w5")])
    with pytest.raises(UserError, match="got 1 without any"):
        ask(guarded_lm(), "loglikelihood", [("w1", ""), ("w1", " w2")])


def test_a_missing_harness_is_one_sentence_with_the_command(monkeypatch):
    monkeypatch.delitem(sys.modules, "dsg.evaluation.benchmarks.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(UserError, match=r"pip install 'dynamic-sae-guardrails\[lm-eval\]'\.$"):
        importlib.import_module("dsg.evaluation.benchmarks.harness")
