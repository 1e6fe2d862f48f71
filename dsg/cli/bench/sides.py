"""Questions answered by this project or by lm-evaluation-harness, in a process of its own."""

import contextlib
import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

import torch

from dsg.cli.bench.memory import forget_highest_memory, highest_memory
from dsg.cli.bench.questions import Workload, random_model, random_questions, word_tokenizer
from dsg.evaluation import Question, encode_question, question_collate, score_questions
from dsg.lm import length_batches

Side = Literal["harness", "ours"]
BatchSize = int | Literal["auto"]
# Log-probability of each option of each question.
Scores = list[list[float]]

SIDES: tuple[Side, ...] = ("harness", "ours")
_PATIENCE = 10.0  # seconds


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
    found = [log_prob for log_prob, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    num = len(questions[0].options)
    return [found[start : start + num] for start in range(0, len(found), num)]


_ANSWERING: dict[Side, Callable[[Any, Any, Sequence[Question], BatchSize], Scores]] = {
    "harness": answer_harness,
    "ours": answer_ours,
}


class Worker:
    """A process that answers the questions whenever it is told to; ends with its `with` block.

    Args:
        side: Who answers.
        workload: Model and questions.
    """

    def __init__(self, side: Side, workload: Workload) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, side, workload, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(timeout=_PATIENCE)
        self._process.kill()

    def run(self, batch_size: BatchSize) -> Answered:
        """Answers all questions once.

        Raises:
            RuntimeError: It fails, or the process has died.
        """
        try:
            self._connection.send(batch_size)
            found = self._connection.recv()
        except (EOFError, ConnectionError):
            found = "the process died; is memory short?"
        if isinstance(found, str):
            raise RuntimeError(f"answering with batch size {batch_size} failed:\n{found}")
        return found


def _serve(connection: Connection, side: Side, workload: Workload, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    logging.disable(logging.WARNING)
    model, tokenizer = random_model(workload), word_tokenizer(workload.vocab_size)
    questions, answer = random_questions(workload), _ANSWERING[side]
    # The harness prints what it finds out about batch sizes.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            # Loads what is imported on first use, and warms up.
            answer(model, tokenizer, questions[:4], 1)
            forget_highest_memory()
            before = highest_memory()
            while True:
                batch_size = connection.recv()
                start = time.perf_counter(), time.process_time()
                scores = answer(model, tokenizer, questions, batch_size)
                end = time.perf_counter(), time.process_time()
                peak = highest_memory() - before
                connection.send(Answered(end[0] - start[0], end[1] - start[1], scores, peak))
        except EOFError:
            return
        except Exception:
            connection.send(traceback.format_exc())
