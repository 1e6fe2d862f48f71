"""From judgements and generations of MT-Bench to measurements."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dsg.evaluation.benchmarks.mt_bench.conversations import NUM_TURNS, Conversation
from dsg.evaluation.metrics import gibberish_rate
from dsg.evaluation.scoring import Values
from dsg.evaluation.summary import Measurement
from dsg.intervals import bootstrap, bootstrap_mean, wilson

DOMAIN = "mt_bench"
KIND = "conversations"

Answers = Sequence[tuple[str, str]]
Ratings = Float[ndarray, "n turns repeats"]


def measure_ratings(
    conversations: Sequence[Conversation], ratings: Ratings, protocol: str
) -> list[Measurement]:
    """The score in all, per turn and per category, its spread over repeats, and the failures.

    A turn's rating is the mean over its repeats, the score the mean over all rated turns, as
    published. The two turns of a conversation depend on each other, so the intervals resample whole
    conversations, of which `n` counts those with a rating. The spread is the standard deviation of
    the whole score from one repeat to another. Failures are counted, out of `n` judgements, and do
    not enter a score.

    Args:
        conversations: What was asked.
        ratings: In the order of the conversations; NaN where the judge gave none.
        protocol: Judge and prompts.
    """
    turns = mean_over_repeats(ratings)
    measurements = _score(DOMAIN, "mt_bench", protocol, turns)
    for turn in range(NUM_TURNS):
        measurements += _score(DOMAIN, f"mt_bench_turn_{turn + 1}", protocol, turns[:, [turn]])
    categories = np.array([conversation.category for conversation in conversations])
    for category in sorted(set(categories.tolist())):
        measurements += _score(category, "mt_bench", protocol, turns[categories == category])
    repeats = [scores[~np.isnan(scores)] for scores in np.moveaxis(ratings, 2, 0)]
    means = [float(scores.mean()) for scores in repeats if scores.size]
    if len(means) > 1:
        spread = float(np.std(means, ddof=1))
        measurements.append(Measurement(DOMAIN, "mt_bench_repeat_sd", protocol, spread, len(means)))
    failed = int(np.isnan(ratings).sum())
    return [*measurements, Measurement(DOMAIN, "judge_failures", protocol, failed, ratings.size)]


def measure_generations(
    values: Values, own: Values, *, guarded: bool, max_new_tokens: int
) -> list[Measurement]:
    """How the answers of each turn read, and how often the guard stepped in.

    Args:
        values: `dsg.evaluation.benchmarks.mt_bench.conversations.COLUMNS` of the answers.
        own: The same of the unguarded model's answers, the measure of gibberish.
        guarded: Whether a guard was attached.
        max_new_tokens: Answers of this length were cut off.
    """
    measurements: list[Measurement] = []
    for turn in (1, 2):
        protocol = f"turn_{turn}"
        columns = {name: values[f"{name}_turn_{turn}"].tolist() for name in _READ}
        n = len(columns["num_tokens"])
        cut = sum(length >= max_new_tokens for length in columns["num_tokens"])
        rates = {"cut_off": wilson(cut, n)}
        own_nll = own[f"nll_turn_{turn}"]
        if not own_nll.isnan().all():
            rates["gibberish_rate"] = gibberish_rate(columns["nll"], own_nll.tolist())
        if guarded:
            rates["trigger_rate"] = wilson(int(sum(columns["triggered"])), n)
        repetition = bootstrap_mean(columns["repetition"])
        measurements.append(Measurement(DOMAIN, "repetition", protocol, **vars(repetition)))
        measurements += [
            Measurement(DOMAIN, name, protocol, **vars(rate)) for name, rate in rates.items()
        ]
    return measurements


def item_rows(
    state: str,
    conversations: Sequence[Conversation],
    answers: Answers,
    values: Values,
    ratings: Ratings | None,
) -> list[dict[str, Any]]:
    """Rows of `items.parquet`, one per conversation; the answers stay on this machine."""
    columns: dict[str, list[Any]] = {name: column.tolist() for name, column in values.items()}
    if ratings is not None:
        turns = mean_over_repeats(ratings)
        columns |= {f"rating_turn_{turn + 1}": turns[:, turn].tolist() for turn in range(NUM_TURNS)}
        # Of both turns or of none: a mean over what is there would compare unlike things.
        columns["rating"] = turns.mean(axis=1).tolist()
    return [
        {
            "guard": state,
            "kind": KIND,
            "domain": conversation.category,
            "pool": DOMAIN,
            "key": conversation.key,
            "id": conversation.id,
            "text": "\n\n".join(answers[place]),
            **{name: column[place] for name, column in columns.items()},
        }
        for place, conversation in enumerate(conversations)
    ]


def answer_rows(
    model: str, conversations: Sequence[Conversation], answers: Answers
) -> list[dict[str, Any]]:
    """The answers in FastChat's format, for its own grading."""
    return [
        {
            "question_id": int(name) if name.isdecimal() else name,
            "answer_id": conversation.key,
            "model_id": model,
            "choices": [{"index": 0, "turns": list(pair)}],
        }
        for conversation, pair in zip(conversations, answers, strict=True)
        for name in (conversation.question_id,)
    ]


def mean_over_repeats(ratings: Ratings) -> Float[ndarray, "n turns"]:
    """Each turn's mean over the repeats that gave a rating; NaN if none did."""
    rated = ~np.isnan(ratings)
    sums, counts = np.where(rated, ratings, 0.0).sum(2), rated.sum(2)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


_READ = ("num_tokens", "repetition", "nll", "triggered")


def _score(
    domain: str, metric: str, protocol: str, turns: Float[ndarray, "n turns"]
) -> list[Measurement]:
    rated = turns[~np.isnan(turns).all(axis=1)]
    if not len(rated):
        return []
    low, high = bootstrap(lambda drawn: float(np.nanmean(drawn)), rated)
    value = float(np.nanmean(rated))
    return [Measurement(domain, metric, protocol, value, len(rated), low, high)]
