"""Two turns under a guard, against a loop over single conversations written out by hand."""

import pytest
import torch

from dsg.errors import UserError
from dsg.evaluation.benchmarks.mt_bench.conversations import (
    Conversation,
    check_room,
    hold,
    read_conversations,
)
from dsg.evaluation.metrics import repeated_share
from dsg.lm.chat import chat_text
from tests.conversations import chat_tokenizer
from tests.dsg.evaluation.scoring_helpers import tiny_guard
from tests.helpers import BOS, EOS, tiny_model, tiny_tokenizer

NEW = 6
THRESHOLD = 0.7


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def conversations():
    turns = [("w1 w2 w3", "w4"), ("w9", "w8 w7"), ("w3 w3 w5 w6", "w2"), ("w20 w21", "w22 w23")]
    return [Conversation(i, f"q{i}", "writing", pair) for i, pair in enumerate(turns)]


def greedy(model, prompt, guard):
    """One token after the other, each from a whole new pass over everything so far."""
    ids, said = list(prompt), []
    for _ in range(NEW):
        tokens = torch.tensor([ids])
        if guard is None:
            logits = model(input_ids=tokens).logits
        else:
            mask = torch.zeros_like(tokens, dtype=torch.bool)
            mask[:, : len(prompt)] = True
            with guard.attached(model, decision="prompt") as attachment:
                logits = model(input_ids=tokens, prompt_mask=mask).logits
                triggered = bool(attachment.triggered[0])
        token = int(logits[0, -1].argmax())
        ids.append(token)
        if token == EOS:
            break
        said.append(token)
    return said, None if guard is None else triggered


@pytest.mark.parametrize("guarded", [False, True])
def test_both_turns_by_hand(tokenizer, guarded):
    model = tiny_model()
    guard = tiny_guard(model, tokenizer, THRESHOLD) if guarded else None
    answers, values = hold(model, tokenizer, conversations(), NEW, guard)
    triggers = []
    for place, conversation in enumerate(conversations()):
        first, second = conversation.turns
        prompt = [BOS, *tokenizer(f"w24 {first} w25", add_special_tokens=False)["input_ids"]]
        said, triggered = greedy(model, prompt, guard)
        one = tokenizer.decode(said, skip_special_tokens=True)
        text = f"w24 {first} w25 {one} w24 {second} w25"
        prompt = [BOS, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        more, again = greedy(model, prompt, guard)
        assert answers[place] == (one, tokenizer.decode(more, skip_special_tokens=True))
        assert values["num_tokens_turn_1"][place] == len(said)
        assert values["repetition_turn_2"][place] == pytest.approx(repeated_share(more))
        if guarded:
            assert values["triggered_turn_1"][place] == triggered
            assert values["triggered_turn_2"][place] == again
            triggers.append((triggered, again))
    if guarded:
        # The second turn decides anew: a guard that was on may be off again.
        assert set(triggers) == {(True, False), (True, True), (False, False)}
    else:
        assert values["density_turn_1"].isnan().all()


def test_the_batch_does_not_matter(tokenizer):
    model = tiny_model()
    guard = tiny_guard(model, tokenizer, THRESHOLD)
    together, values = hold(model, tokenizer, conversations(), NEW, guard)
    for place, conversation in enumerate(conversations()):
        [alone], single = hold(model, tokenizer, [conversation], NEW, guard)
        assert alone == together[place]
        assert single["density_turn_2"][0] == values["density_turn_2"][place]


def test_chat_text_has_one_bos(tokenizer):
    text = chat_text(tokenizer, ["w1", "w2", "w3"])
    assert text == " w24 w1 w25 w2 w24 w3 w25"
    assert tokenizer(text)["input_ids"].count(BOS) == 1
    with pytest.raises(UserError, match="needs a tokenizer with a chat template"):
        chat_text(tiny_tokenizer(), ["w1"])


def test_room_for_both_answers(tokenizer):
    # The longest pair of questions is 10 tokens with its markers and bos.
    check_room(tokenizer, conversations(), 20, context=50)
    with pytest.raises(UserError, match=r"must be at most 19,.*10 tokens.*49 positions, got 20"):
        check_room(tokenizer, conversations(), 20, context=49)


PUBLISHED = {"question_id": 111, "category": "math", "turns": ["a", "b"], "reference": ["4", ""]}
ON_THE_HUB = {"prompt_id": 7, "category": "writing", "prompt": ["c", "d"], "reference": []}


def test_both_formats():
    first, second = read_conversations([PUBLISHED, ON_THE_HUB])
    assert first == Conversation(0, "111", "math", ("a", "b"), ("4", ""))
    assert second == Conversation(1, "7", "writing", ("c", "d"), ("", ""))
    assert first.key != second.key
    without = {name: PUBLISHED[name] for name in ("question_id", "category", "turns")}
    assert read_conversations([without])[0].references == ("", "")


def test_reference_answers_take_precedence():
    answers = [{"question_id": 111, "choices": [{"index": 0, "turns": ["is 4", "is 5"]}]}]
    assert read_conversations([PUBLISHED], answers)[0].references == ("is 4", "is 5")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"turns": ["a"]}, "a list of 2 questions"),
        ({"turns": ["a", " "]}, "a list of 2 questions"),
        ({"turns": "ab"}, "a list of 2 questions"),
        ({"question_id": None}, "must have `question_id`"),
        ({"category": None}, "and `category`"),
    ],
)
def test_broken_rows(change, complaint):
    with pytest.raises(UserError, match=complaint):
        read_conversations([{**PUBLISHED, **change}])


def test_no_rows_and_repeated_rows():
    with pytest.raises(UserError, match="at least one row"):
        read_conversations([])
    with pytest.raises(UserError, match="got 1 twice"):
        read_conversations([PUBLISHED, PUBLISHED])
