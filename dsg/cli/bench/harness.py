"""Multiple choice by this project and by lm-evaluation-harness: time, memory, and the answers."""

import contextlib
import functools
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, NamedTuple

import torch

from dsg.cli.bench.questions import Workload, random_model, random_questions, word_tokenizer
from dsg.cli.bench.tables import forget_highest_memory, highest_memory
from dsg.evaluation import Question, encode_question, question_collate, score_questions
from dsg.lm import length_batches

Side = Literal["harness", "ours"]
BatchSize = int | Literal["auto"]
# Log-probability of each option of each question.
Scores = list[list[float]]

SIDES: tuple[Side, ...] = ("harness", "ours")


class Answered(NamedTuple):
    """One run over all questions: its time, scores, and the memory that was needed so far."""

    seconds: float
    processor_seconds: float
    scores: Scores
    peak_bytes: int


def answer_ours(
    model: Any, tokenizer: Any, questions: Sequence[Question], batch_size: BatchSize
) -> Scores:
    """Log-probabilities of the options, as an evaluation run of this project gets them."""
    lengths = [max(map(len, encode_question(tokenizer, q)[1])) for q in questions]
    collate = question_collate(tokenizer)
    scores: dict[int, list[float]] = {}
    for places in length_batches(lengths, batch_size):
        values = score_questions(model, collate([questions[place] for place in places]))
        columns = [values[f"log_prob_{i}"] for i in range(questions[0].num_answers)]
        scores |= dict(zip(places, torch.stack(columns, 1).tolist(), strict=True))
    return [scores[place] for place in range(len(questions))]


def answer_harness(
    model: Any, tokenizer: Any, questions: Sequence[Question], batch_size: BatchSize
) -> Scores:
    """Log-probabilities of the options, as the harness gets them."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    requests = [
        Instance("loglikelihood", {}, (question.prompt, option), place)
        for place, question in enumerate(questions)
        for option in question.options
    ]
    language_model: Any = HFLM
    lm = language_model(model, tokenizer=tokenizer, batch_size=batch_size)
    log_probs = [log_prob for log_prob, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    num = len(questions[0].options)
    return [log_probs[start : start + num] for start in range(0, len(log_probs), num)]


_ANSWERING: dict[Side, Callable[[Any, Any, Sequence[Question], BatchSize], Scores]] = {
    "harness": answer_harness,
    "ours": answer_ours,
}


class Worker:
    """A process that answers the questions whenever it is asked; ends with its `with` block.

    Args:
        side: Who answers.
        workload: Model and questions.
    """

    def __init__(self, side: Side, workload: Workload) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._task = (side, workload, torch.get_num_threads())

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, batch_size: BatchSize) -> Answered:
        """Answers all questions once.

        Raises:
            RuntimeError: It fails, or the process has died.
        """
        try:
            return self._pool.submit(_answer, *self._task, batch_size).result()
        except Exception as error:
            died = isinstance(error, BrokenProcessPool)
            reason = "the process died; is memory short?" if died else error.__cause__ or error
            raise RuntimeError(
                f"answering with batch size {batch_size} failed:\n{reason}"
            ) from error


def _answer(side: Side, workload: Workload, num_threads: int, batch_size: BatchSize) -> Answered:
    model, tokenizer, questions, before = _prepared(side, workload, num_threads)
    # The harness prints what it learns about batch sizes.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        start = time.perf_counter(), time.process_time()
        scores = _ANSWERING[side](model, tokenizer, questions, batch_size)
        end = time.perf_counter(), time.process_time()
    return Answered(end[0] - start[0], end[1] - start[1], scores, highest_memory() - before)


@functools.cache
def _prepared(
    side: Side, workload: Workload, num_threads: int
) -> tuple[Any, Any, list[Question], int]:
    """Model, tokenizer, questions, and the memory that the process has held so far."""
    torch.set_num_threads(num_threads)
    logging.disable(logging.WARNING)
    model, tokenizer = random_model(workload), word_tokenizer(workload.vocab_size)
    questions = random_questions(workload)
    # Loads what is imported on first use, and warms up.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        _ANSWERING[side](model, tokenizer, questions[:4], 1)
    forget_highest_memory()
    return model, tokenizer, questions, highest_memory()


# A batch size so much slower than the best one is the last that is tried: larger ones only lose.
_HOPELESS = 1.5


@dataclass(frozen=True)
class SideCost:
    """What answering all questions costs one side.

    Attributes:
        side: Which.
        batch_size: Its fastest one, which was used.
        searched: Shortest time of each batch size that was tried, in seconds; larger ones were
            left out once they got much slower.
        seconds: Median time.
        lowest_seconds: Shortest time.
        highest_seconds: Longest time.
        processor_seconds: Median processor time of all threads; what else runs hardly changes it.
        peak_bytes: How far answering raised the highest resident memory of its own process.
    """

    side: Side
    batch_size: BatchSize
    searched: dict[str, float]
    seconds: float
    lowest_seconds: float
    highest_seconds: float
    processor_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Comparison:
    """Both sides on the same questions.

    Attributes:
        kind: Of the questions.
        num_questions: How many.
        harness: The harness's cost.
        ours: This project's.
        ours_alike: This project's at the harness's batch size.
        speed_ratio: Median over the repeats of harness time / our time.
        lowest_ratio: Lowest of those.
        highest_ratio: Highest of those.
        largest_difference: Of any option's log-probability, in nats.
        same_answers: Whether both choose the same option of every question.
    """

    kind: str
    num_questions: int
    harness: SideCost
    ours: SideCost
    ours_alike: SideCost
    speed_ratio: float
    lowest_ratio: float
    highest_ratio: float
    largest_difference: float
    same_answers: bool


def compare(
    workload: Workload, batch_sizes: Sequence[BatchSize], repeats: int, search_repeats: int = 2
) -> Comparison:
    """Measures both sides, each in its own process and at the fastest of the batch sizes.

    Args:
        workload: Model and questions.
        batch_sizes: Those that each side may choose from, ascending.
        repeats: Timed runs of each side, in turn.
        search_repeats: Runs of each batch size, of which the fastest counts.

    Raises:
        RuntimeError: A process fails.
    """
    searched: dict[Side, dict[BatchSize, float]] = {
        side: _search(side, workload, batch_sizes, search_repeats) for side in SIDES
    }
    best: dict[Side, BatchSize] = {}
    for side, times in searched.items():
        best[side] = min(times, key=lambda size, times=times: times[size])
    places: dict[str, tuple[Side, BatchSize]] = {
        "harness": ("harness", best["harness"]),
        "ours": ("ours", best["ours"]),
        "ours_alike": ("ours", best["harness"]),
    }
    # Each batch size in a process of its own, whose highest memory no other one has raised.
    runs: dict[tuple[Side, BatchSize], list[Answered]] = {place: [] for place in places.values()}
    with ExitStack() as stack:
        workers = {place: stack.enter_context(Worker(place[0], workload)) for place in runs}
        for _ in range(repeats + 1):
            for place, worker in workers.items():
                runs[place].append(worker.run(place[1]))
    costs = {name: _cost(*place, searched[place[0]], runs[place]) for name, place in places.items()}
    theirs, ours = runs[places["harness"]], runs[places["ours"]]
    # The first runs warmed up.
    pairs = list(zip(theirs, ours, strict=True))[1:]
    ratios = [theirs_run.seconds / other.seconds for theirs_run, other in pairs]
    scores = [torch.tensor(side[0].scores, dtype=torch.float64) for side in (theirs, ours)]
    return Comparison(
        kind=workload.kind,
        num_questions=workload.num_questions,
        **costs,
        speed_ratio=median(ratios),
        lowest_ratio=min(ratios),
        highest_ratio=max(ratios),
        largest_difference=(scores[0] - scores[1]).abs().max().item(),
        same_answers=torch.equal(scores[0].argmax(1), scores[1].argmax(1)),
    )


def _search(
    side: Side, workload: Workload, batch_sizes: Sequence[BatchSize], repeats: int
) -> dict[BatchSize, float]:
    """Shortest time of each batch size, in seconds, until they get much slower."""
    shortest: dict[BatchSize, float] = {}
    with Worker(side, workload) as worker:
        for size in batch_sizes:
            shortest[size] = worker.run(size).seconds
            if shortest[size] > _HOPELESS * min(shortest.values()):
                break
        # In rounds: what else the machine does must not hit one batch size only.
        for _ in range(repeats - 1):
            limit = _HOPELESS * min(shortest.values())
            for size, seconds in list(shortest.items()):
                if seconds <= limit:
                    shortest[size] = min(seconds, worker.run(size).seconds)
    return shortest


def _cost(
    side: Side, best: BatchSize, searched: dict[BatchSize, float], runs: Sequence[Answered]
) -> SideCost:
    seconds = [run.seconds for run in runs[1:]]
    return SideCost(
        side=side,
        batch_size=best,
        searched={str(size): times for size, times in searched.items()},
        seconds=median(seconds),
        lowest_seconds=min(seconds),
        highest_seconds=max(seconds),
        processor_seconds=median(run.processor_seconds for run in runs[1:]),
        peak_bytes=runs[-1].peak_bytes,
    )
