import json

import pytest

from dsg.errors import UserError
from dsg.evaluation.benchmarks.mt_bench.conversations import Conversation
from dsg.evaluation.benchmarks.mt_bench.prompts import built_in_prompts, is_guided, load_prompts

ANSWERS = ("my first answer", "my second answer")


def conversation(category, references=("", "")):
    return Conversation(0, "1", category, ("first {question}?", "second question?"), references)


def sent(category, turn, references=("", ""), prompts=None):
    messages = (prompts or built_in_prompts()).messages(
        conversation(category, references), ANSWERS, turn
    )
    return messages, messages[-1]["content"]


def test_the_first_turn_is_judged_alone():
    messages, text = sent("writing", 1)
    assert [message["role"] for message in messages] == ["user"]
    assert "first {question}?" in text  # braces of a question are no fields
    assert "my first answer" in text
    assert "second" not in text
    assert "[[rating]]" in text
    assert "eference" not in text


def test_the_second_turn_is_judged_within_the_conversation():
    _, text = sent("writing", 2)
    parts = ["first {question}?", "my first answer", "second question?", "my second answer"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "second question in the conversation" in text


@pytest.mark.parametrize("turn", [1, 2])
def test_questions_with_a_right_answer_come_with_it(turn):
    references = ("is 4", "is 5")
    _, text = sent("math", turn, references)
    assert "is 4" in text
    assert ("is 5" in text) == (turn == 2)
    assert "is 4" not in sent("writing", turn, references)[1]


def test_a_missing_reference_leaves_the_open_prompt():
    half = ("is 4", "")
    assert is_guided(conversation("coding", half), 1)
    assert not is_guided(conversation("coding", half), 2)
    assert "is 4" not in sent("coding", 2, half)[1]


def test_the_version_follows_the_texts():
    prompts = built_in_prompts()
    assert prompts.version == f"dsg-single-v1-{prompts.sha256[:8]}"
    # Whoever changes a prompt changes the version, and scores are no longer comparable.
    assert prompts.sha256[:8] == "0e506101"


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def published():
    """Rows of FastChat's file, in other words."""
    single, multi = "Q {question} A {answer}", "{question_1} {answer_1} {question_2} {answer_2}"
    texts = {
        "pair-v2": "{answer_a}",
        "single-v1": single,
        "single-math-v1": single + " R {ref_answer_1}",
        "single-v1-multi-turn": multi,
        "single-math-v1-multi-turn": multi + " {ref_answer_1} {ref_answer_2}",
    }
    return [
        {"name": name, "type": "single", "system_prompt": f"be {name}", "prompt_template": text}
        for name, text in texts.items()
    ]


def test_the_published_file(tmp_path):
    prompts = load_prompts(write(tmp_path / "judge_prompts.jsonl", published()))
    assert prompts.version.startswith("judge_prompts-")
    messages, text = sent("math", 1, ("is 4", "is 5"), prompts)
    assert messages[0] == {"role": "system", "content": "be single-math-v1"}
    assert text == "Q first {question}? A my first answer R is 4"


@pytest.mark.parametrize("damage", ["missing", "field", "json", "file"])
def test_a_wrong_file(tmp_path, damage):
    rows, path = published(), tmp_path / "p.jsonl"
    if damage == "missing":
        rows.pop()
    if damage == "field":
        rows[1]["prompt_template"] += " {unknown}"
    write(path, rows)
    if damage == "json":
        path.write_text("{")
    if damage == "file":
        path.unlink()
    with pytest.raises(UserError, match="take FastChat's"):
        load_prompts(path)
