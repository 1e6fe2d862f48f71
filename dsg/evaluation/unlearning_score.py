"""The unlearning score of a sweep, without choosing the settings on what is reported."""

from collections.abc import Sequence
from dataclasses import dataclass

from dsg.errors import UserError
from dsg.evaluation.metrics import Estimate
from dsg.selection import wilson

UTILITY_KEPT = 0.99


@dataclass(frozen=True)
class Outcome:
    """What one setting of a sweep reached on one half of the questions.

    Attributes:
        forget_correct: Forget questions answered rightly; of a fact in several wordings a share.
        forget_total: Forget questions.
        utility: Accuracy on the retain questions, in [0, 1].
    """

    forget_correct: float
    forget_total: int
    utility: float

    @property
    def forget_accuracy(self) -> float:
        """Share of the forget questions that is answered rightly."""
        return self.forget_correct / self.forget_total


@dataclass(frozen=True)
class UnlearningScore:
    """The score of a sweep.

    Attributes:
        setting: Number of the chosen setting in the sweep.
        score: 1 - its forget accuracy on the half that is reported, with Wilson's interval.
        utility: Its utility there, as a share of the base model's; it may be below 0.99.
    """

    setting: int
    score: Estimate
    utility: float


def unlearning_score(
    choosing: Sequence[Outcome],
    reported: Sequence[Outcome],
    base_choosing: Outcome,
    base_reported: Outcome,
) -> UnlearningScore | None:
    """1 - the lowest forget accuracy among settings that keep 99 % of the base model's utility.

    The published score takes that minimum on the very questions that it reports. Here one half of
    the questions chooses the setting and the other half gives the number.

    Args:
        choosing: Each setting's outcome on the half that chooses.
        reported: Each setting's outcome on the other half, in the same order.
        base_choosing: The base model on the half that chooses.
        base_reported: The base model on the other half.

    Returns:
        The score; of settings with equal forget accuracy the one with more utility is chosen, then
        the earlier one. None where no setting keeps enough utility.

    Raises:
        UserError: The halves have different numbers of settings, there are no forget questions, or
            the base model has no utility to keep.
    """
    if len(choosing) != len(reported):
        raise UserError(
            f"`choosing` and `reported` must hold the same settings, got {len(choosing)} and "
            f"{len(reported)}; evaluate each setting on both halves."
        )
    everything = [*choosing, *reported, base_choosing, base_reported]
    if min(outcome.forget_total for outcome in everything) < 1:
        raise UserError("`forget_total` must be at least 1, got 0; take a larger half.")
    if min(base_choosing.utility, base_reported.utility) <= 0:
        raise UserError(
            "`utility` of the base model must be above 0 on both halves, got 0; there is nothing "
            "to keep."
        )
    kept = [
        (outcome.forget_accuracy, -outcome.utility, index)
        for index, outcome in enumerate(choosing)
        if outcome.utility >= UTILITY_KEPT * base_choosing.utility
    ]
    if not kept:
        return None
    chosen = min(kept)[-1]
    found = reported[chosen]
    wrong = wilson(found.forget_total - found.forget_correct, found.forget_total)
    return UnlearningScore(
        setting=chosen,
        score=Estimate(wrong.value, wrong.n, wrong.low, wrong.high),
        utility=found.utility / base_reported.utility,
    )
