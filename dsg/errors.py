"""The one exception type that the command line turns into a single sentence, and common checks."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from typing import Any

MAX_SEED = 2**32 - 1  # NumPy's largest


class UserError(ValueError):
    """A mistake the user can mend.

    The message is one sentence: what was given, what was wanted, what came, and the remedy.
    """


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it, each once: a library may have closed the chain to a ring.

    Args:
        error: What was raised in the end.
    """
    seen: list[BaseException] = []
    while error is not None and not any(error is known for known in seen):
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing if no known name is near."""
    near = difflib.get_close_matches(given, list(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def check_each_once(name: str, values: Sequence[Any]) -> None:
    """Refuses an empty list, and a value that stands in it twice.

    Raises:
        UserError: It is one.
    """
    if not values or any(values.count(value) > 1 for value in values):
        raise UserError(
            f"`{name}` must list at least one value and none twice, got {list(values)}."
        )


def check_seeds(name: str, seeds: Sequence[int]) -> None:
    """Refuses numbers that are no seeds, and a seed that comes twice: its run would count double.

    Raises:
        UserError: There is one.
    """
    check_each_once(name, seeds)
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise UserError(f"`{name}` must be from 0 to {MAX_SEED}, got {seed}; choose another.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a value that is not among the choices.

    Raises:
        UserError: If it is not.
    """
    if value not in choices:
        raise UserError(f"`{name}` must be one of {list(choices)}, got {value!r}; choose one.")


def check_number(
    name: str, value: Any, fits: Callable[[Any], bool], wanted: str, remedy: str
) -> None:
    """Refuses what is no number, as in an edited file, and a number out of range.

    Raises:
        UserError: If it is.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not fits(value):
        raise UserError(f"`{name}` must be {wanted}, got {value!r}; {remedy}.")
