"""Which questions are to be forgotten and which retained, each once and on one side only."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from dsg.errors import UserError
from dsg.evaluation.benchmarks.multiple_choice.prompts import ChoiceRow, row_key

_log = logging.getLogger(__name__)

Pool = Literal["forget", "retain"]
Identity = tuple[str, tuple[str, ...]]


def check_names(names: Mapping[Pool, Sequence[str]]) -> None:
    """Refuses a run without questions, and a set that is to be forgotten and retained.

    Raises:
        UserError: It is one.
    """
    if not any(names.values()):
        raise UserError("`forget` or `retain` must name a set of questions, got none; name one.")
    both = sorted({*names["forget"]} & {*names["retain"]})
    if both:
        raise UserError(
            f"`forget` and `retain` must not share a set, got {', '.join(both)} in both; remove it "
            "from one of them."
        )


def check_unused(subject: str, pool: Pool, pools: Mapping[str, Pool]) -> None:
    """Refuses a set whose results could be taken for those of another set or pool.

    Args:
        subject: Its name.
        pool: Its pool.
        pools: Those of the sets read before.

    Raises:
        UserError: The name is taken.
    """
    if subject in pools or (subject in ("forget", "retain") and subject != pool):
        raise UserError(
            f"every set must have a name of its own, got {subject!r} in `{pool}` where that name "
            "is taken; rename the file or its subject."
        )


def identity(row: ChoiceRow) -> Identity:
    """What makes a question the same one: its text and choices, but for spacing and order.

    Not but for case: `AA` and `aa` are different genotypes.
    """
    return _spaced(row.question), tuple(sorted(map(_spaced, row.choices)))


def usable_rows(name: str, rows: Sequence[ChoiceRow]) -> list[ChoiceRow]:
    """The questions of a set, each once and with four different choices, keys set.

    MMLU holds 27 rows twice, and a few whose choices are not four; a line tells how many there are.

    Args:
        name: The set's.
        rows: As the data has them.

    Raises:
        UserError: No question is left.
    """
    different = [row for row in rows if len(set(map(_spaced, row.choices))) == len(row.choices)]
    first = {identity(row): row for row in reversed(different)}
    kept = [replace(row, key=row_key(row)) for row in different if first[identity(row)] is row]
    alike, repeated = len(rows) - len(different), len(different) - len(kept)
    if not kept:
        raise UserError(
            f"{name!r} must hold a question with four different choices, got none among "
            f"{len(rows)}; mend the data."
        )
    if alike or repeated:
        _log.warning(
            "%d of the %d questions of %s are left out: %d for equal choices, %d that stand there "
            "before.",
            alike + repeated,
            len(rows),
            name,
            alike,
            repeated,
        )
    return kept


def check_pools(sets: Mapping[str, Sequence[ChoiceRow]], pools: Mapping[str, Pool]) -> None:
    """Refuses questions that are to be forgotten and retained.

    Args:
        sets: The questions of each set.
        pools: The pool of each set.

    Raises:
        UserError: There are some.
    """
    set_of: dict[Pool, dict[Identity, str]] = {"forget": {}, "retain": {}}
    for name, rows in sets.items():
        set_of[pools[name]] |= {identity(row): name for row in rows}
    shared = [key for key in set_of["forget"] if key in set_of["retain"]]
    if shared:
        first = shared[0]
        raise UserError(
            f"`forget` and `retain` must not share a question, got {len(shared)} in both, such as "
            f"{first[0][:60]!r} in {set_of['forget'][first]!r} and {set_of['retain'][first]!r}; "
            "remove them from one side."
        )


def repeated_in_pool(
    sets: Mapping[str, Sequence[ChoiceRow]], pools: Mapping[str, Pool]
) -> set[tuple[str, str]]:
    """Set and key of the questions that stand in an earlier set of their pool too.

    78 questions of MMLU belong to two subjects. Each subject keeps its own, as published, while
    what is said of the pool counts them once; a line tells how many there are.

    Args:
        sets: The questions of each set.
        pools: The pool of each set.
    """
    seen: set[tuple[Pool, Identity]] = set()
    repeated: set[tuple[str, str]] = set()
    for name, rows in sets.items():
        pool = pools[name]
        keys: dict[tuple[Pool, Identity], str] = {(pool, identity(row)): row.key for row in rows}
        repeated |= {(name, key) for question, key in keys.items() if question in seen}
        seen |= keys.keys()
    if repeated:
        _log.warning(
            "%d questions stand in two sets of their pool (%s) and count once in its figures.",
            len(repeated),
            ", ".join(sorted({name for name, _ in repeated})),
        )
    return repeated


def _spaced(text: str) -> str:
    return " ".join(text.split())
