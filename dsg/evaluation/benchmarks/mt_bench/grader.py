"""Has the answers to MT-Bench judged: single-answer grading of both turns."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsg.evaluation.benchmarks.mt_bench.conversations import NUM_TURNS, Conversation
from dsg.evaluation.benchmarks.mt_bench.grading import Judgements, Request, grade
from dsg.evaluation.benchmarks.mt_bench.judge import Judge, JudgeSettings, request_key
from dsg.evaluation.benchmarks.mt_bench.judge_api import ApiJudge
from dsg.evaluation.benchmarks.mt_bench.judge_local import LocalJudge
from dsg.evaluation.benchmarks.mt_bench.prompts import is_guided, load_prompts
from dsg.evaluation.benchmarks.mt_bench.scores import Answers, Ratings
from dsg.io import short_name

JUDGEMENTS_FILE = "judgements.jsonl"


class Grader:
    """One judge with its prompts.

    Args:
        settings: Of the judge.

    Attributes:
        protocol: Judge and prompts, as the results name them.

    Raises:
        UserError: The settings cannot work, or the prompts cannot be read.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        self._settings = settings
        self._prompts = load_prompts(settings.prompts_file)
        self._judge = make_judge(settings)
        self.protocol = f"{short_name(settings.model)}/{self._prompts.version}"

    def check(self) -> None:
        """Find out whether the judge can be asked.

        Raises:
            UserError: It cannot.
        """
        self._judge.check()

    def grade(
        self,
        folder: Path,
        conversations: Sequence[Conversation],
        answers: Mapping[str, Answers],
    ) -> tuple[dict[str, Ratings], dict[str, Any]]:
        """Have all answers judged that are not judged yet.

        Args:
            folder: Holds the judgements.
            conversations: What was asked.
            answers: Both answers of each conversation in the same order, by the guard's state.

        Returns:
            The ratings by the guard's state, in the order of the conversations and NaN where the
            judge gave none; and who judged how, for `run.json`.
        """
        requests = {state: self.requests(conversations, said) for state, said in answers.items()}
        found, failures = grade(
            self._judge,
            [request for of in requests.values() for request in of],
            Judgements(folder / JUDGEMENTS_FILE),
            self._settings.max_attempts,
        )
        shape = (len(conversations), NUM_TURNS, self._settings.repeats)
        ratings = {
            state: np.array([found.get(request.key, np.nan) for request in of]).reshape(shape)
            for state, of in requests.items()
        }
        guided = [is_guided(c, turn) for c in conversations for turn in range(1, NUM_TURNS + 1)]
        facts = {
            **self._settings.facts(),
            "prompts": self._prompts.version,
            "prompts_sha256": self._prompts.sha256,
            "turns_graded_with_reference": sum(guided),
            "failures": sorted(failures.values()),
        }
        return ratings, facts

    def requests(self, conversations: Sequence[Conversation], answers: Answers) -> list[Request]:
        """All judgements of some answers, ordered by conversation, turn and repeat."""
        return [
            Request(
                request_key(self._settings, messages, repeat),
                messages,
                repeat,
                {"question_id": conversation.question_id, "turn": turn, "repeat": repeat},
            )
            for conversation, said in zip(conversations, answers, strict=True)
            for turn in range(1, NUM_TURNS + 1)
            for messages in (self._prompts.messages(conversation, said, turn),)
            for repeat in range(self._settings.repeats)
        ]


def make_judge(settings: JudgeSettings) -> Judge:
    """The judge of the settings; nothing is loaded or asked yet.

    Raises:
        UserError: As for `JudgeSettings.check`; or the package for endpoints is missing.
    """
    settings.check()
    return LocalJudge(settings) if settings.kind == "local" else ApiJudge(settings)
