"""Prompts for the judge of MT-Bench answers: single-answer grading of either turn.

The built-in prompts have the structure of the published ones (`single-v1` and its variants: the
second turn is shown as a whole conversation, and questions with a right answer come with a
reference) in words of their own. Scores are comparable only between runs with the same prompts and
judge. Whoever wants the published wording gives FastChat's `judge_prompts.jsonl`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsg.errors import UserError
from dsg.evaluation.benchmarks.mt_bench.conversations import Conversation
from dsg.io import read_text

Message = dict[str, str]

# Categories whose answers are right or wrong, as published.
GUIDED_CATEGORIES = ("math", "reasoning", "coding")

_BUILT_IN = "dsg-single-v1"
_NAMES = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
_RATE = (
    "Be impartial and as objective as you can. First explain your judgement in a few sentences. "
    "Then rate the answer on a scale from 1 to 10, in exactly this form: "
    '"[[rating]]", for example "Rating: [[5]]".'
)
_OPEN = (
    "You are to judge the quality of {what}. Consider how helpful, relevant, accurate, deep, "
    "creative and detailed it is. " + _RATE
)
_GUIDED = (
    "You are to judge the quality of {what}. Consider whether it is correct and helpful. Compare "
    "it with the reference answer that is given, and point out every mistake. " + _RATE
)
_FIRST = "an AI assistant's answer to the user's question below"
_SECOND = (
    "an AI assistant's answer to the second question in the conversation below, which is what your "
    "rating is about"
)
_QUESTION = "[Question]\n{question}\n\n"
_REFERENCE = "[Reference answer begins]\n{ref_answer_1}\n[Reference answer ends]\n\n"
_ANSWER = "[Assistant's answer begins]\n{answer}\n[Assistant's answer ends]"
_REFERENCES = (
    "[Reference conversation begins]\n\n### User:\n{question_1}\n\n### Reference answer:\n"
    "{ref_answer_1}\n\n### User:\n{question_2}\n\n### Reference answer:\n{ref_answer_2}\n\n"
    "[Reference conversation ends]\n\n"
)
_CONVERSATION = (
    "[Conversation begins]\n\n### User:\n{question_1}\n\n### Assistant:\n{answer_1}\n\n### User:\n"
    "{question_2}\n\n### Assistant:\n{answer_2}\n\n[Conversation ends]"
)


@dataclass(frozen=True)
class JudgePrompts:
    """The four prompts of a judge.

    Attributes:
        version: Their name and the beginning of their hash.
        sha256: Of all their texts.
        texts: System message (empty for none) and template of the user's message, by name.
    """

    version: str
    sha256: str
    texts: Mapping[str, tuple[str, str]]

    def messages(
        self, conversation: Conversation, answers: tuple[str, str], turn: int
    ) -> list[Message]:
        """The judge's messages about one turn.

        Args:
            conversation: The questions.
            answers: The assistant's answers.
            turn: 1 or 2; the judge of the second sees both.
        """
        kind = "single-math-v1" if is_guided(conversation, turn) else "single-v1"
        system, template = self.texts[kind if turn == 1 else f"{kind}-multi-turn"]
        (question_1, question_2), (answer_1, answer_2) = conversation.turns, answers
        text = template.format(
            question=question_1,
            answer=answer_1,
            question_1=question_1,
            question_2=question_2,
            answer_1=answer_1,
            answer_2=answer_2,
            ref_answer_1=conversation.references[0],
            ref_answer_2=conversation.references[1],
        )
        user = {"role": "user", "content": text}
        return [{"role": "system", "content": system}, user] if system else [user]


def is_guided(conversation: Conversation, turn: int) -> bool:
    """Whether the judge is shown a reference: of all turns up to this one, or of none."""
    has_references = all(conversation.references[:turn])
    return conversation.category in GUIDED_CATEGORIES and has_references


def built_in_prompts() -> JudgePrompts:
    """The prompts of this package."""
    texts = (
        _join(_OPEN, _FIRST, _QUESTION + _ANSWER),
        _join(_GUIDED, _FIRST, _QUESTION + _REFERENCE + _ANSWER),
        _join(_OPEN, _SECOND, _CONVERSATION),
        _join(_GUIDED, _SECOND, _REFERENCES + _CONVERSATION),
    )
    return _made(_BUILT_IN, {name: ("", text) for name, text in zip(_NAMES, texts, strict=True)})


def load_prompts(path: str | Path | None) -> JudgePrompts:
    """The prompts of a file in FastChat's format, or the built-in ones for None.

    Raises:
        UserError: The file cannot be read, or one of the four prompts is missing or malformed.
    """
    if path is None:
        return built_in_prompts()
    try:
        lines = read_text(path).splitlines()
        rows = {row["name"]: row for row in map(json.loads, filter(str.strip, lines))}
        chosen = [rows[name] for name in _NAMES]
        made = _made(
            Path(path).stem,
            {row["name"]: (row["system_prompt"], row["prompt_template"]) for row in chosen},
        )
        for category in ("math", "writing"):
            example = Conversation(0, "0", category, ("q", "q"), ("r", "r"))
            for turn in (1, 2):
                made.messages(example, ("a", "a"), turn)
    except (RecursionError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"`prompts_file` must be a JSONL file of judge prompts with {', '.join(_NAMES)}, each "
            f"with `system_prompt` and `prompt_template`, got {str(path)!r} "
            f"({type(error).__name__}: {error}); take FastChat's judge_prompts.jsonl."
        ) from error
    return made


def _join(rule: str, what: str, rest: str) -> str:
    return f"[Instruction]\n{rule.format(what=what)}\n\n{rest}"


def _made(name: str, texts: dict[str, tuple[str, str]]) -> JudgePrompts:
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
    return JudgePrompts(f"{name}-{digest[:8]}", digest, texts)
