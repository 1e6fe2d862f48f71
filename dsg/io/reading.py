"""Files that a user names: opened only if they are files, decoded and parsed with one sentence.

A pipe would be waited for and a device read for ever; both are refused before they are opened.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from dsg.errors import UserError


def check_file(path: str | Path) -> None:
    """Refuses what is no regular file.

    Raises:
        UserError: It is missing or of another kind.
    """
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        raise _unreadable(path, error) from None
    if stat.S_ISDIR(mode):
        raise _unreadable(path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    if not stat.S_ISREG(mode):
        raise UserError(
            f"{str(path)!r} cannot be read (it is a pipe, a socket or a device); save its "
            "content in a file and name that."
        )


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file.

    Raises:
        UserError: It is missing, no regular file, or may not be read.
    """
    check_file(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def read_text(path: str | Path) -> str:
    """The content of a text file in UTF-8, with or without a byte order mark.

    Raises:
        UserError: As for `read_bytes`; or it is no such text.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{str(path)!r} is not text in UTF-8 (byte {error.start} is the first that does not "
            "fit); convert it."
        ) from None


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: As for `read_text`; or it is no JSON.
    """
    return parse_json(read_text(path), str(path))


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file.

    Raises:
        UserError: As for `read_text`; or it is no YAML, or a mapping has a key twice, of which the
            first would be dropped without a word.
    """
    import yaml  # most readers need none of it

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            if twice:
                line = node.start_mark.line + 1
                raise UserError(
                    f"{str(path)!r} has the key {twice[0]!r} twice, in the mapping from line "
                    f"{line}; delete one."
                )
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(read_text(path), Loader)
    except RecursionError:
        raise UserError(f"{str(path)!r} is not YAML that can be read; mend it.") from None
    except (yaml.YAMLError, ValueError) as error:  # a date that there is not is a ValueError
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{str(path)!r} is not YAML ({' '.join(str(error).split())}); mend it."
        ) from None


def parse_json(text: str, place: str, remedy: str = "mend or delete it") -> Any:
    """The value of a JSON text.

    Args:
        text: The text.
        place: File, and perhaps line, that it comes from.
        remedy: What to do if it is no JSON.

    Raises:
        UserError: It is no JSON, or one that no sensible file holds.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text.strip() else ""
        raise UserError(f"{place}{line} is not JSON ({error.msg}); {remedy}.") from None
    except (RecursionError, ValueError):  # nested too deeply; a number of thousands of digits
        raise UserError(
            f"{place} is not JSON that can be read (nested too deeply, or a number too long); "
            f"{remedy}."
        ) from None


def _unreadable(path: str | Path, error: OSError) -> UserError:
    return UserError(f"{str(path)!r} cannot be read ({reason(error)}); check its name.")


def reason(error: Exception) -> str:
    """Why the system refused a path, in lower case and without the path."""
    return (getattr(error, "strerror", None) or str(error)).lower()
