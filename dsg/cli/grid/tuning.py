"""Choosing settings on the validation half: the same number of tries for every method."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.progress import track

from dsg.cli.grid.choosing import Choice, Try, best
from dsg.cli.grid.overrides import combinations
from dsg.evaluation import Question, QuestionBatch, alignment, score_all
from dsg.guard import Guard, GuardBuilder, GuardSettings
from dsg.selection import FeatureStatistics


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
        found_by_try: list[Try] = []
        # A grid asks for more features than some rule may leave; what was taken is in the guard.
        logging.getLogger("dsg.selection.rules").setLevel(logging.ERROR)
        for varied in track(combinations(grid), f"choosing {settings.method}", transient=True):
            found = self._accuracies(self.make(replace(settings, **varied)))
            score = alignment(
                found["retain"], found["forget"], self._base["retain"], self._base["forget"]
            )
            validation = {
                "alignment": score,
                "forget_accuracy": found["forget"],
                "retain_accuracy": found["retain"],
            }
            found_by_try.append((varied, validation))
        return found_by_try

    def _accuracies(self, guard: Guard | None) -> dict[str, float]:
        correct = score_all(self._maker.model, self._batches, guard)["correct"]
        return {domain: correct[rows].mean().item() for domain, rows in self._rows.items()}
