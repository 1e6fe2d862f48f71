"""Multiple choice by this project and by lm-evaluation-harness: time, memory, and the answers."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

import torch

from dsg.cli.bench.questions import Workload
from dsg.cli.bench.sides import SIDES, Answered, BatchSize, Side, Worker

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
    ratios = [one.seconds / other.seconds for one, other in pairs]
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
    found: dict[BatchSize, float] = {}
    with Worker(side, workload) as worker:
        for size in batch_sizes:
            found[size] = worker.run(size).seconds
            if found[size] > _HOPELESS * min(found.values()):
                break
        # In rounds: what else the machine does must not hit one batch size only.
        for _ in range(repeats - 1):
            limit = _HOPELESS * min(found.values())
            for size, seconds in list(found.items()):
                if seconds <= limit:
                    found[size] = min(seconds, worker.run(size).seconds)
    return found


def _cost(
    side: Side, best: BatchSize, searched: dict[BatchSize, float], runs: Sequence[Answered]
) -> SideCost:
    seconds = [run.seconds for run in runs[1:]]
    return SideCost(
        side=side,
        batch_size=best,
        searched={str(size): found for size, found in searched.items()},
        seconds=median(seconds),
        lowest_seconds=min(seconds),
        highest_seconds=max(seconds),
        processor_seconds=median(run.processor_seconds for run in runs[1:]),
        peak_bytes=runs[-1].peak_bytes,
    )
