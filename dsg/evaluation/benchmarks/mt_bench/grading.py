"""Has the answers to MT-Bench judged, many at a time, and keeps every judgement on disk.

A judgement is known by everything that decides it (`request_key`). What is on
disk is not asked again, so a killed grading goes on where it stopped. Answers that are equal word
for word, such as those of a guard that did not trigger and of the plain model, share theirs.
"""

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsg.evaluation.benchmarks.mt_bench.conversations import NUM_TURNS, Conversation
from dsg.evaluation.benchmarks.mt_bench.judge import (
    Judge,
    JudgeFailure,
    JudgeSettings,
    parse_rating,
    request_key,
)
from dsg.evaluation.benchmarks.mt_bench.judge_api import ApiJudge
from dsg.evaluation.benchmarks.mt_bench.judge_local import LocalJudge
from dsg.evaluation.benchmarks.mt_bench.prompts import Message, is_guided, load_prompts
from dsg.evaluation.benchmarks.mt_bench.scores import Answers, Ratings
from dsg.io import append_line, read_lines, short_name

JUDGEMENTS_FILE = "judgements.jsonl"

_REMINDER = (
    "Your reply held no rating. Reply with nothing but your rating from 1 to 10, in exactly this "
    'form: "Rating: [[5]]".'
)
# Each failure has cost all its retries; an endpoint that is gone would take hours to fail.
_GIVE_UP_AFTER = 10
_NO_RATING = "no rating"
_NOT_ASKED = "not asked, because the judge had failed too often in a row"

logger = logging.getLogger(__name__)


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
        requests = {state: self._requests(conversations, pairs) for state, pairs in answers.items()}
        by_key, failures = grade(
            self._judge,
            [request for asked in requests.values() for request in asked],
            folder / JUDGEMENTS_FILE,
            self._settings.max_attempts,
        )
        shape = (len(conversations), NUM_TURNS, self._settings.repeats)
        ratings = {
            state: np.array([by_key.get(request.key, np.nan) for request in asked]).reshape(shape)
            for state, asked in requests.items()
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

    def _requests(self, conversations: Sequence[Conversation], answers: Answers) -> "list[Request]":
        """All judgements of some answers, ordered by conversation, turn and repeat."""
        return [
            Request(
                request_key(self._settings, messages, repeat),
                messages,
                repeat,
                {"question_id": conversation.question_id, "turn": turn, "repeat": repeat},
            )
            for conversation, pair in zip(conversations, answers, strict=True)
            for turn in range(1, NUM_TURNS + 1)
            for messages in (self._prompts.messages(conversation, pair, turn),)
            for repeat in range(self._settings.repeats)
        ]


def make_judge(settings: JudgeSettings) -> Judge:
    """The judge of the settings; nothing is loaded or asked yet.

    Raises:
        UserError: As for `JudgeSettings.check`; or the package for endpoints is missing.
    """
    settings.check()
    return LocalJudge(settings) if settings.kind == "local" else ApiJudge(settings)


@dataclass(frozen=True)
class Request:
    """One judgement to be made.

    Attributes:
        key: All that decides it, see `dsg.evaluation.benchmarks.mt_bench.judge.request_key`.
        messages: What the judge is sent.
        seed: Tells repeats apart.
        about: What is judged, for readers of the file.
    """

    key: str
    messages: Sequence[Message]
    seed: int
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Judged:
    """What came of a request.

    Attributes:
        rating: In [1, 10]; None if the judge gave none.
        reply: The last thing that the judge said.
        asked: How often it was asked; 0 if it was given up before.
        error: Why there is no rating; None if there is one.
    """

    rating: float | None
    reply: str
    asked: int
    error: str | None


def grade(
    judge: Judge, requests: Sequence[Request], path: Path, max_attempts: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Make all judgements that are not on disk yet.

    Args:
        judge: Who is asked.
        requests: What is asked; requests with the same key are made once.
        path: JSONL file of judgements, which need not exist; those that failed are in it with the
            reason, and are asked for again.
        max_attempts: How often a judgement without a rating is asked for, in all. From the second
            time on the judge sees its reply and is reminded of the form.

    Returns:
        The ratings by the requests' keys; and why the others have none, by theirs.
    """
    wanted = {request.key: request for request in requests}
    ratings = {
        line["request"]: float(line["rating"])
        for line in read_lines(path)
        if isinstance(line, dict) and line.keys() >= {"request", "rating"} and line["rating"]
    }
    missing = {key: r for key, r in wanted.items() if key not in ratings}
    failures: dict[str, str] = {}
    patience = _Patience()
    logger.info("Of %d judgements %d are asked for.", len(wanted), len(missing))
    with ThreadPoolExecutor(judge.concurrency) as pool:
        futures: dict[Future[Judged], Request] = {
            pool.submit(_judge_patiently, patience, judge, request, max_attempts): request
            for request in missing.values()
        }
        try:
            for future in as_completed(futures):
                request, judged = futures[future], future.result()
                if judged.asked:
                    append_line(path, {**request.about, **vars(judged), "request": request.key})
                if judged.rating is None:
                    failures[request.key] = judged.error or _NO_RATING
                else:
                    ratings[request.key] = judged.rating
        except BaseException:
            # Ctrl-C must not wait for hundreds of requests; those under way end by themselves.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for reason, count in sorted(Counter(failures.values()).items()):
        logger.warning("%d judgements failed: %s.", count, reason)
    return {key: ratings[key] for key in wanted.keys() - failures.keys()}, failures


def judge_one(judge: Judge, request: Request, max_attempts: int) -> Judged:
    """Ask for one judgement until there is a rating, or it has been asked for often enough."""
    messages, reply = list(request.messages), ""
    for attempt in range(1, max_attempts + 1):
        try:
            reply = judge.reply(messages, request.seed)
        except JudgeFailure as failure:
            return Judged(None, reply, attempt, str(failure))
        rating = parse_rating(reply)
        if rating is not None:
            return Judged(rating, reply, attempt, None)
        if reply.strip():
            replied: Message = {"role": "assistant", "content": reply}
            messages = [*request.messages, replied, {"role": "user", "content": _REMINDER}]
    return Judged(None, reply, max_attempts, _NO_RATING)


class _Patience:
    """Ends after too many requests in a row without any reply; shared by threads."""

    def __init__(self) -> None:
        self._failed_in_a_row = 0
        self._lock = threading.Lock()

    @property
    def is_over(self) -> bool:
        return self._failed_in_a_row >= _GIVE_UP_AFTER

    def note(self, replied: bool) -> None:
        with self._lock:
            if not self.is_over:
                self._failed_in_a_row = 0 if replied else self._failed_in_a_row + 1


def _judge_patiently(
    patience: _Patience, judge: Judge, request: Request, max_attempts: int
) -> Judged:
    if patience.is_over:
        return Judged(None, "", 0, _NOT_ASKED)
    judged = judge_one(judge, request, max_attempts)
    patience.note(judged.error in (None, _NO_RATING))
    return judged
