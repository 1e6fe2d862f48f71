"""What several commands do with their options."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsg.errors import UserError
from dsg.io import reason


def check_json(path: Path | None) -> None:
    """Refuses a `--json` that could not be written, before anything is measured.

    Raises:
        UserError: It lies in no folder, or is one.
    """
    if path is None:
        return
    try:
        fits = path.absolute().parent.is_dir() and not path.is_dir()
    except OSError:  # a name that is too long
        fits = False
    if not fits:
        raise UserError(f"--json must be a file in an existing folder, got {path}; create it.")


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Says in one sentence that a place cannot be written.

    Not around a run: its directory would be emptied, as after any mistake of the user.

    Args:
        what: The place.

    Raises:
        UserError: The system refused it.
    """
    try:
        yield
    except OSError as error:
        place = f" at {error.filename}" if error.filename else ""
        raise UserError(
            f"{what} cannot be written ({reason(error)}{place}); make it writable or name another."
        ) from error
