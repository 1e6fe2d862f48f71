"""Makes questions with four choices into prompts, by each of the three protocols.

The text of every prompt leaves out what the tokenizer adds by itself, such as its bos token.
"""

from dataclasses import dataclass, replace
from typing import Any

from dsg.evaluation.benchmarks.multiple_choice.subjects import topic
from dsg.evaluation.items import Protocol, Question, item_key
from dsg.lm import chat_text
from dsg.selection import texts_digest

LETTERS = ("A", "B", "C", "D")
_INTRODUCTION = "The following are multiple choice questions (with answers) about {topic}.\n"


@dataclass(frozen=True)
class ChoiceRow:
    """A question with four choices, as the data sets have it.

    Attributes:
        subject: The set that it belongs to, such as `wmdp-bio` or `human_aging`.
        question: Its text.
        choices: Texts of the choices.
        answer: Index of the right choice, in [0, 3].
        key: What the question is known by in every run, unique in its set; see `row_key`.
    """

    subject: str
    question: str
    choices: tuple[str, str, str, str]
    answer: int
    key: str = ""


def row_key(row: ChoiceRow) -> str:
    """Key of a question, which neither protocol nor place in the file changes."""
    return item_key(row.question, *row.choices)


def rows_digest(rows: list[ChoiceRow]) -> str:
    """SHA-256 over questions, choices and answers, whatever the order of the questions."""
    return texts_digest("\x1f".join([row.question, *row.choices, str(row.answer)]) for row in rows)


def make_question(
    protocol: Protocol,
    row: ChoiceRow,
    tokenizer: Any,
    *,
    id: int,
    pool: str | None = None,
    asked: bool = True,
) -> Question:
    """Make the question of a row by any protocol.

    Args:
        protocol: Which.
        row: The row.
        tokenizer: Has the chat template that `dsg` needs.
        id: Unique among the questions that are scored together.
        pool: Second name under which it is reported.
        asked: Without it only the choices are shown, as the papers' question filter does to find
            the questions that can be answered without being read.

    Raises:
        UserError: The protocol needs a chat template and the tokenizer has none.
    """
    if protocol == "cloze":
        question = cloze_question(row, asked=asked)
    elif protocol == "lm_eval":
        question = lm_eval_question(row, asked=asked)
    else:
        question = dsg_question(row, tokenizer, asked=asked)
    return replace(question, id=id, pool=pool)


def lm_eval_question(row: ChoiceRow, *, asked: bool = True) -> Question:
    """The question as lm-evaluation-harness 0.4 asks it in `wmdp_*` and `mmlu_*`, zero-shot."""
    # The harness strips the question, and parts the description from it by an empty line.
    introduction = _introduction(row, "lm_eval") + "\n" + row.question.strip() + "\n"
    prompt = f"{introduction if asked else ''}{_lettered(row)}\nAnswer:"
    return _question(row, "lm_eval", prompt, tuple(f" {letter}" for letter in LETTERS))


def dsg_question(row: ChoiceRow, tokenizer: Any, *, asked: bool = True) -> Question:
    """The question as the code of the DSG paper asks it: in a chat whose answer begins `Answer: (`.

    Raises:
        UserError: The tokenizer has no chat template.
    """
    introduction = _introduction(row, "dsg") + row.question + "\n"
    text = f"{introduction if asked else ''}{_lettered(row)}"
    options = tuple(option for letter in LETTERS for option in (letter, f" {letter}"))
    remedy = "take an instruction-tuned model or the protocol 'lm_eval'"
    prompt = chat_text(tokenizer, [text], "`protocol` 'dsg'", remedy)
    return _question(row, "dsg", prompt + "Answer: (", options)


def cloze_question(row: ChoiceRow, *, asked: bool = True) -> Question:
    r"""The question without its choices, `Question: ...\nAnswer:`, continued by a choice's text."""
    prompt = f"Question: {row.question.strip()}\nAnswer:" if asked else "Answer:"
    return _question(row, "cloze", prompt, tuple(f" {choice.strip()}" for choice in row.choices))


def _introduction(row: ChoiceRow, protocol: Protocol) -> str:
    return _INTRODUCTION.format(topic=topic(row.subject, protocol))


def _lettered(row: ChoiceRow) -> str:
    pairs = zip(LETTERS, row.choices, strict=True)
    return "\n".join(f"{letter}. {choice}" for letter, choice in pairs)


def _question(
    row: ChoiceRow, protocol: Protocol, prompt: str, options: tuple[str, ...]
) -> Question:
    return Question(
        id=0,
        domain=row.subject,
        form=None,
        prompt=prompt,
        options=options,
        answer=row.answer,
        protocol=protocol,
        key=row.key,
    )
