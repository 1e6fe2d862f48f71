"""What a model is unlearned or attacked with while multiple-choice questions are evaluated."""

from collections.abc import Sequence
from typing import Literal

from datamodules.parts.training_text import TrainingRow
from dsg.errors import UserError
from dsg.evaluation.benchmarks.multiple_choice.prompts import ChoiceRow, cloze_question
from dsg.selection import TextSource, check_texts, evenly

AttackText = Literal["forget", "questions"]


def question_texts(questions: Sequence[ChoiceRow]) -> list[str]:
    """Questions with their right answers, for an attacker who has them.

    Raises:
        UserError: There are none.
    """
    if not questions:
        raise UserError(
            "`forget` must name a set of questions for the attack text 'questions', got none; name "
            "one."
        )
    return [_answered(row) for row in questions]


def corpus_texts(source: TextSource) -> dict[str, list[str]]:
    """Forget and retain text to train on.

    Raises:
        UserError: There is no text of a kind.
    """
    texts = {"forget": list(source.forget_texts()), "retain": list(source.retain_texts())}
    for kind in texts:
        if not texts[kind]:
            raise UserError(
                f"`corpora` must give {kind} text to train on, got none; add a source, or a larger "
                f"one, to `{kind}`."
            )
    return texts


def check_unasked(texts: Sequence[str], questions: Sequence[ChoiceRow]) -> None:
    """Refuses an attacker's text that is an evaluated question.

    Args:
        texts: The attacker's.
        questions: All forget questions, whether or not this run asks them.

    Raises:
        UserError: There is one.
    """
    asked = [*map(_answered, questions), *(row.question for row in questions)]
    check_texts({"attack": texts, "evaluation": asked})


def mixed(forget: Sequence[TrainingRow], retain: Sequence[TrainingRow]) -> list[TrainingRow]:
    """All forget rows and as many retain rows, evenly from all of them, repeated if too few."""
    return [*forget, *evenly(retain, len(forget), repeat=True)]


def _answered(row: ChoiceRow) -> str:
    question = cloze_question(row)
    return question.prompt + question.options[question.answer]
