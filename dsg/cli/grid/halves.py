"""The unlearning score of a sweep whose settings were measured on both halves of the questions."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsg.evaluation import PROTOCOLS, Outcome, unlearning_score
from dsg.io import row

METRIC = "unlearning_score"

Row = Mapping[str, Any]


def score_rows(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One row per seed with the score, under the settings that were chosen on validation questions.

    Args:
        rows: Result rows of guarded evaluations on `validation` and on `test`, whose `experiment`
            tells the settings. The unguarded model's accuracies are the base's.

    Returns:
        Rows of the metric `unlearning_score`; none for a seed in which no setting keeps 99 % of the
        utility, or which was not measured on both halves.
    """
    by_seed: dict[Any, list[Row]] = {}
    for found in rows:
        if found["metric"] == "accuracy" and found["protocol"] in PROTOCOLS:
            by_seed.setdefault(found["seed"], []).append(found)
    scored = [_score(seed, measured) for seed, measured in by_seed.items()]
    return [found for found in scored if found is not None]


def _score(seed: Any, rows: Sequence[Row]) -> dict[str, Any] | None:
    outcomes = {
        split: {guard: _outcomes(rows, split, guard) for guard in ("off", "on")}
        for split in ("validation", "test")
    }
    choosing, reported = outcomes["validation"], outcomes["test"]
    settings = [name for name in choosing["on"] if name in reported["on"]]
    if not settings:
        return None
    first = settings[0]
    scored = unlearning_score(
        [choosing["on"][name] for name in settings],
        [reported["on"][name] for name in settings],
        choosing["off"][first],
        reported["off"][first],
    )
    if scored is None:
        return None
    setting, score = scored
    like = next(found for found in rows if found["guard"] == "on" and found["domain"] == "forget")
    return row(
        **{
            **like,
            "experiment": settings[setting],
            "split": "test",
            "seed": seed,
            "metric": METRIC,
            **vars(score),
        }
    )


def _outcomes(rows: Sequence[Row], split: str, guard: str) -> dict[str, Outcome]:
    """Outcome of each setting that has both accuracies."""
    found: dict[str, dict[str, Row]] = {}
    for one in rows:
        if (one["split"], one["guard"]) == (split, guard) and one["domain"] in ("forget", "retain"):
            found.setdefault(one["experiment"], {})[one["domain"]] = one
    return {
        name: Outcome(
            both["forget"]["value"] * both["forget"]["n"],
            both["forget"]["n"],
            both["retain"]["value"],
        )
        for name, both in found.items()
        if len(both) == 2
    }
