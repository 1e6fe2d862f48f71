"""Reads and checks multiple-choice questions: WMDP, MMLU, and own files of the same fields."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datamodules.multiple_choice.pools import usable_rows
from dsg.errors import UserError
from dsg.evaluation.benchmarks.multiple_choice.prompts import LETTERS, ChoiceRow
from dsg.evaluation.benchmarks.multiple_choice.subjects import (
    MMLU_SUBJECTS,
    WMDP_TOPICS,
    is_file_name,
)
from dsg.io import dataset_revision, load_rows, short_name

WMDP = "cais/wmdp@7125571f22f032c56415e7980f48d877dd830ff8"
MMLU = "cais/mmlu@c30699e8356da336a370243923dbaf21066bb9fe"


def read_sets(
    names: Sequence[str], wmdp: str = WMDP, mmlu: str = MMLU
) -> dict[str, list[ChoiceRow]]:
    """Read sets of questions.

    Args:
        names: Sets of WMDP, subjects of MMLU, and paths of files, as `expand_sets` returns them. A
            file's questions belong to the sets that its column `subject` names, or to one that is
            called like the file.
        wmdp: Hub name or folder of WMDP.
        mmlu: Hub name or folder of MMLU.

    Returns:
        The questions of each set in the order of the data, each once, keys set.

    Raises:
        UserError: Something cannot be read, a question is malformed, or a set comes twice.
    """
    sets: dict[str, list[ChoiceRow]] = {}
    subjects = [name for name in names if name in MMLU_SUBJECTS]
    whole = _whole_mmlu(mmlu) if set(subjects) == set(MMLU_SUBJECTS) else {}
    for name in names:
        if is_file_name(name):
            parts = _by_subject(parse_rows(load_rows(name, None, "test"), Path(name).stem))
        elif name in WMDP_TOPICS:
            parts = {name: parse_rows(load_rows(wmdp, name, "test"), name)}
        elif whole:
            parts = {name: whole[name]}
        else:
            rows = parse_rows(load_rows(mmlu, name, "test"), name)
            parts = {name: [replace(row, subject=name) for row in rows]}
        for subject, rows in parts.items():
            if subject in sets:
                raise UserError(
                    f"every set must have a name of its own, got {subject!r} again from {name!r}; "
                    "rename the file or its subject."
                )
            sets[subject] = usable_rows(subject, rows)
    return sets


def set_revisions(names: Collection[str], wmdp: str, mmlu: str) -> dict[str, str | None]:
    """The commits of WMDP and MMLU, as far as they hold some of the sets.

    Args:
        names: Sets, as `read_sets` returns them.
        wmdp: Hub name or folder of WMDP.
        mmlu: Hub name or folder of MMLU.
    """
    revisions = {}
    for source, members in ((wmdp, WMDP_TOPICS), (mmlu, MMLU_SUBJECTS)):
        used = [name for name in names if name in members]
        if used:
            revisions[short_name(source)] = dataset_revision(source, used[0])
    return revisions


def parse_rows(rows: Iterable[Mapping[str, Any]], name: str) -> list[ChoiceRow]:
    """Check rows with `question`, `choices` (or columns `A` to `D`), `answer`, maybe `subject`.

    Args:
        rows: As the data has them; choices may be a JSON list in a string, and the answer a number
            or a letter.
        name: The set's name, for messages and rows without a subject.

    Raises:
        UserError: A question has not four choices, no right answer, or an empty text.
    """
    parsed = [
        _parse(row, name, f"question {number} of {name!r}")
        for number, row in enumerate(rows, start=1)
    ]
    if not parsed:
        raise UserError(f"{name!r} must hold at least one question, got none; check the data.")
    return parsed


def _parse(row: Mapping[str, Any], name: str, place: str) -> ChoiceRow:
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise UserError(
            f"{place} must have a text in `question`, got {_shown(question)}; mend the data."
        )
    choices = _choices(row, place)
    first, second, third, fourth = choices
    subject = row.get("subject") or name
    return ChoiceRow(
        subject=str(subject),
        question=question,
        choices=(first, second, third, fourth),
        answer=_answer(row.get("answer"), place),
    )


def _choices(row: Mapping[str, Any], place: str) -> list[str]:
    choices = row.get("choices")
    if choices is None and all(letter in row for letter in LETTERS):
        choices = [row[letter] for letter in LETTERS]
    if isinstance(choices, str):
        try:
            choices = json.loads(choices)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{place} must have a JSON list in `choices`, got {_shown(choices)} ({error.msg}); "
                "mend the data."
            ) from None
    if not isinstance(choices, list | tuple) or len(choices) != len(LETTERS):
        got = f"{len(choices)}" if isinstance(choices, list | tuple) else _shown(choices)
        raise UserError(
            f"{place} must have four `choices` (or the columns A, B, C and D), got {got}; mend the "
            "data."
        )
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise UserError(
                f"{place} must have a text in each choice, got {_shown(choice)}; mend the data."
            )
    return list(choices)


def _answer(answer: Any, place: str) -> int:
    given = answer.strip() if isinstance(answer, str) else answer
    if given in LETTERS:
        return LETTERS.index(given)
    if isinstance(given, str) and given.isdecimal():
        given = int(given)
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < len(LETTERS):
        raise UserError(
            f"{place} must have an `answer` from 0 to 3 (or A to D), got {_shown(answer)}; mend "
            "the data."
        )
    return given


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _whole_mmlu(mmlu: str) -> dict[str, list[ChoiceRow]]:
    """All subjects at once: 57 data sets would be asked for one by one."""
    by_subject = _by_subject(parse_rows(load_rows(mmlu, "all", "test"), "all"))
    missing = sorted(set(MMLU_SUBJECTS) - set(by_subject))
    if missing:
        raise UserError(
            f"the configuration 'all' of {mmlu!r} must hold every subject of MMLU, but "
            f"{len(missing)} are missing, such as {missing[0]!r}; name the subjects that it has."
        )
    return by_subject


def _by_subject(rows: Iterable[ChoiceRow]) -> dict[str, list[ChoiceRow]]:
    by_subject: dict[str, list[ChoiceRow]] = {}
    for row in rows:
        by_subject.setdefault(row.subject, []).append(row)
    return by_subject
