"""Compares two runs on the items that both measured, by paired tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsg.errors import UserError
from dsg.evaluation.items_file import read_items
from dsg.evaluation.paired import PairedTest, compare_values
from dsg.evaluation.summary import named_twice

# What is no number, cannot be averaged over items, or says nothing alone.
_NO_METRIC = ("guard", "kind", "domain", "pool", "key", "id", "fact", "text", "chosen", "nll_sum")
_NO_METRIC_PREFIX = ("num_tokens", "log_prob_")


@dataclass(frozen=True)
class _Scores:
    """Values of one item, the names under which they are reported, and what makes them a pair."""

    names: frozenset[str]
    pair: str
    values: dict[str, float]


# Kind, domain and key of an item, which are the same in every run -> what it scored.
_Items = dict[tuple[str, str, str], _Scores]


@dataclass(frozen=True)
class Comparison:
    """One metric of two runs on the items that both measured.

    Attributes:
        guards: State of the guard in the first and in the second run.
        kind: `questions`, `passages`, `prompts` or `conversations`.
        domain: What it was measured on: a domain, or a pool of several.
        metric: Name of the value; `nll_per_token` is a passage's mean loss.
        test: Means, difference, interval, p value and number of items.
    """

    guards: tuple[str, str]
    kind: str
    domain: str
    metric: str
    test: PairedTest


@dataclass(frozen=True)
class Overlap:
    """How many items of two runs were paired.

    Attributes:
        guards: State of the guard in the first and in the second run.
        both: Items of both runs.
        first_only: Items of the first run alone.
        second_only: Items of the second run alone.
    """

    guards: tuple[str, str]
    both: int
    first_only: int
    second_only: int


def compare_runs(
    first: str | Path, second: str | Path, guards: tuple[str, str] | None = None
) -> tuple[list[Comparison], list[Overlap]]:
    """Compare two runs on the items that both measured.

    Args:
        first: Directory of a finished run.
        second: Directory of the other one, or of the same, to compare two states of its guard.
        guards: State of the guard (`none`, `off`, `on`) to take from either; None compares each
            state that both runs have with itself.

    Returns:
        The comparisons, ordered by state, kind, domain and metric, and how many items there were
        for each pair of states. An item without a value in one of the runs does not enter that
        metric. Questions about one fact in several wordings are one pair, of their means.

    Raises:
        UserError: A directory holds no items, they cannot be told apart, or the runs share none.
    """
    runs = [_read(folder) for folder in (first, second)]
    pairs = [guards] if guards else [(state, state) for state in runs[0] if state in runs[1]]
    if not pairs or any(
        state not in run for pair in pairs for state, run in zip(pair, runs, strict=True)
    ):
        states = [sorted(run) for run in runs]
        raise UserError(
            f"the runs must have the states of the guard that are to be compared, got {states[0]} "
            f"in {str(first)!r} and {states[1]} in {str(second)!r}; choose one of each with "
            "--guard_a and --guard_b."
        )
    items = {pair: (runs[0][pair[0]], runs[1][pair[1]]) for pair in pairs}
    overlaps = [
        Overlap(pair, len(a.keys() & b), len(a.keys() - b), len(b.keys() - a))
        for pair, (a, b) in items.items()
    ]
    if not any(overlap.both for overlap in overlaps):
        raise UserError(
            f"{str(first)!r} and {str(second)!r} must have measured the same items, got "
            f"{overlaps[0].first_only} and {overlaps[0].second_only} of which none is the same; "
            "evaluate both on the same data and split."
        )
    comparisons = [row for pair, both in items.items() for row in _compare(pair, *both)]
    return comparisons, overlaps


def _read(run_dir: str | Path) -> dict[str, _Items]:
    """What each item of a run scored, by the guard's state."""
    states: dict[str, _Items] = {}
    for row in read_items(run_dir):
        domain, key = row["domain"], row["key"]
        if not key:
            raise UserError(
                f"items must have a key to be compared, got one of {domain!r} without in "
                f"{str(run_dir)!r}; evaluate again with data whose items have keys."
            )
        items = states.setdefault(row["guard"], {})
        if (row["kind"], domain, key) in items:
            raise UserError(
                f"items must be told apart by kind, domain and key, got {key} of {domain!r} twice "
                f"in {str(run_dir)!r}; evaluate the data sets in runs of their own."
            )
        names, fact = frozenset({domain, row.get("pool") or domain}), row.get("fact")
        pair = f"{domain} {key}" if fact is None else f"fact {fact}"
        items[row["kind"], domain, key] = _Scores(names, pair, _values(row))
    return states


def _values(row: dict[str, Any]) -> dict[str, float]:
    values = {
        name: float(value)
        for name, value in row.items()
        if value is not None
        and name not in _NO_METRIC
        and not name.startswith(_NO_METRIC_PREFIX)
        and not np.isnan(value)
    }
    if row.get("nll_sum") is not None and row.get("num_tokens"):
        values["nll_per_token"] = row["nll_sum"] / row["num_tokens"]
    return values


def _compare(guards: tuple[str, str], first: _Items, second: _Items) -> list[Comparison]:
    columns: dict[tuple[str, str, str], dict[str, list[tuple[float, float]]]] = {}
    shared = first.keys() & second.keys()
    twice = named_twice(
        (item[1], next(iter(first[item].names - {item[1]}), None)) for item in shared
    )
    # In the order of the keys: the resampling must not depend on the order of the files.
    for item in sorted(shared):
        a, b = first[item], second[item]
        for metric in a.values.keys() & b.values.keys():
            for name in (a.names & b.names) - twice:
                pairs = columns.setdefault((item[0], name, metric), {})
                pairs.setdefault(a.pair, []).append((a.values[metric], b.values[metric]))
    comparisons = []
    for column, pairs in sorted(columns.items()):
        # Each run's mean over the wordings of each fact.
        means = [np.mean(wordings, axis=0).tolist() for wordings in pairs.values()]
        comparisons.append(Comparison(guards, *column, compare_values(*zip(*means, strict=True))))
    return comparisons


def choose(
    comparisons: Sequence[Comparison], metrics: Sequence[str], domains: Sequence[str]
) -> list[Comparison]:
    """The comparisons of some metrics and domains; an empty list takes all.

    Raises:
        UserError: A name is unknown.
    """
    for option, wanted, measured in (
        ("metric", metrics, {comparison.metric for comparison in comparisons}),
        ("domain", domains, {comparison.domain for comparison in comparisons}),
    ):
        unknown = sorted(set(wanted) - measured)
        if unknown:
            raise UserError(
                f"--{option} must be one of {', '.join(sorted(measured))}, got {unknown[0]!r}."
            )
    return [
        comparison
        for comparison in comparisons
        if (not metrics or comparison.metric in metrics)
        and (not domains or comparison.domain in domains)
    ]
