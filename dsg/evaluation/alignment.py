"""The alignment score of an evaluation, with its interval over facts."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from dsg.evaluation import metrics
from dsg.evaluation.items import Question
from dsg.evaluation.metrics import Estimate
from dsg.intervals import bootstrap


def facts_of(questions: Sequence[Question], rows: Sequence[int]) -> list[list[int]]:
    """The rows about each fact; questions of no known fact stand for themselves.

    Args:
        questions: All questions.
        rows: Positions of those that count.
    """
    found: dict[tuple[bool, int], list[int]] = {}
    for row in rows:
        fact = questions[row].fact
        found.setdefault((fact is None, row if fact is None else fact), []).append(row)
    return list(found.values())


def measured_alignment(
    questions: Sequence[Question],
    retain: Sequence[int],
    forget: Sequence[int],
    correct: Float[Tensor, " n"],
    base_correct: Float[Tensor, " n"],
    chance: float,
) -> Estimate:
    """The score of a model beside the base model on the same questions.

    The interval is the percentile bootstrap's over whole facts, each with both models' answers,
    because these depend on each other.

    Args:
        questions: All questions.
        retain: Positions of the retain questions.
        forget: Positions of the forget questions.
        correct: Whether each question is answered rightly, 0 or 1.
        base_correct: The same of the base model.
        chance: Accuracy of guessing.
    """

    def score(retained: np.ndarray, forgotten: np.ndarray) -> float:
        retain_sums, forget_sums = retained.sum(axis=0), forgotten.sum(axis=0)
        kept, base_kept = (retain_sums[:2] / retain_sums[2]).tolist()
        known, base_known = (forget_sums[:2] / forget_sums[2]).tolist()
        return metrics.alignment(kept, known, base_kept, base_known, chance)

    # Per fact: answered rightly, rightly by the base model, questions.
    groups = [
        np.array(
            [
                [correct[of].sum().item(), base_correct[of].sum().item(), len(of)]
                for of in facts_of(questions, rows)
            ]
        )
        for rows in (retain, forget)
    ]
    low, high = bootstrap(score, *groups)
    return Estimate(score(*groups), sum(map(len, groups)), low, high)
