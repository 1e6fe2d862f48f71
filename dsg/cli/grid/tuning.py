"""Choosing on the validation half: the best of equally many tries."""

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.progress import track

from dsg.cli.configs import combinations
from dsg.errors import UserError
from dsg.evaluation import Question, QuestionBatch, alignment, score_all
from dsg.guard import Guard, GuardBuilder, GuardSettings
from dsg.selection import FeatureStatistics


@dataclass(frozen=True)
class Choice:
    """The best settings of a method on the validation half.

    Attributes:
        settings: What was varied, at its best.
        validation: `alignment`, `forget_accuracy`, `retain_accuracy` there.
        tried: Number of settings that were compared.
    """

    settings: dict[str, Any]
    validation: dict[str, float]
    tried: int


Try = tuple[dict[str, Any], dict[str, float]]


def best(tries: Sequence[Try]) -> Choice:
    """The try with the highest alignment; the earlier one of equals."""
    settings, validation = max(tries, key=lambda pair: pair[1]["alignment"])
    return Choice(settings, validation, len(tries))


def validation_scores(rows: Iterable[Mapping[str, Any]], epoch: int | None) -> dict[str, float]:
    """Alignment and the accuracies behind it, as one evaluation on validation facts measured them.

    Args:
        rows: Result rows of a run.
        epoch: Which evaluation; None where the run has a single one.

    Raises:
        UserError: The run measured none of them then, or on other facts.
    """
    measured = {
        (row["domain"], row["metric"]): row["value"]
        for row in rows
        if (row["epoch"], row["protocol"], row["split"]) == (epoch, "cloze", "validation")
        and row["guard"] != "off"
    }
    try:
        return {
            "alignment": measured["forget", "alignment"],
            "forget_accuracy": measured["forget", "accuracy"],
            "retain_accuracy": measured["retain", "accuracy"],
        }
    except KeyError as error:
        domain, metric = error.args[0]
        raise UserError(
            f"A method is tuned by what its run measures on validation facts, and there is no "
            f"{metric} of the domain {domain!r} after epoch {epoch}; set data.init_args.val_split: "
            "validation and enough epochs."
        ) from None


class GuardTuner:
    """Compares guard settings by their accuracies on validation questions.

    Args:
        maker: Makes the guards.
        forget: Statistics of the forget text.
        questions: Validation questions of the domains `forget` and `retain`.
        batches: The same questions.
    """

    def __init__(
        self,
        maker: GuardBuilder,
        forget: FeatureStatistics,
        questions: Sequence[Question],
        batches: Sequence[QuestionBatch],
    ) -> None:
        self._maker = maker
        self._forget = forget
        self._batches = batches
        by_id = sorted(questions, key=lambda question: question.id)
        self._rows = {
            domain: [row for row, question in enumerate(by_id) if question.domain == domain]
            for domain in ("forget", "retain")
        }
        self._base = self._accuracies(None)

    def make(self, settings: GuardSettings) -> Guard:
        """The guard of these settings."""
        maker = copy.copy(self._maker)
        maker.settings = settings
        return maker.make(self._forget)

    def choose(self, settings: GuardSettings, grid: dict[str, list[Any]]) -> Choice:
        """The best of what `tries` compares."""
        return best(self.tries(settings, grid))

    def tries(self, settings: GuardSettings, grid: dict[str, list[Any]]) -> list[Try]:
        """Try every combination of a grid.

        Args:
            settings: What stays fixed.
            grid: Values to try, by the name of the setting.
        """
        tried: list[Try] = []
        # A grid asks for more features than some rule may leave; what was taken is in the guard.
        logging.getLogger("dsg.selection.rules").setLevel(logging.ERROR)
        for varied in track(combinations(grid), f"choosing {settings.method}", transient=True):
            accuracies = self._accuracies(self.make(replace(settings, **varied)))
            score = alignment(
                accuracies["retain"],
                accuracies["forget"],
                self._base["retain"],
                self._base["forget"],
            )
            validation = {
                "alignment": score,
                "forget_accuracy": accuracies["forget"],
                "retain_accuracy": accuracies["retain"],
            }
            tried.append((varied, validation))
        return tried

    def _accuracies(self, guard: Guard | None) -> dict[str, float]:
        correct = score_all(self._maker.model, self._batches, guard)["correct"]
        return {domain: correct[rows].mean().item() for domain, rows in self._rows.items()}
