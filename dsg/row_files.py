"""Rows of the user's own files: JSON Lines, JSON, CSV and Parquet."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsg.errors import UserError

ROW_FILES = (".jsonl", ".json", ".csv", ".parquet")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a file's rows; its kind follows from its name.

    Args:
        path: JSONL with an object in every line, JSON with a list of objects, CSV whose first line
            names the columns (all values are strings), or Parquet.

    Raises:
        UserError: The file is missing, empty, of another kind, or broken; names the line.
    """
    readers: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    if path.suffix.lower() not in readers:
        raise UserError(f"{path} must be one of {', '.join(readers)}; convert it.")
    try:
        rows = readers[path.suffix.lower()](path)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{path} cannot be read ({reason}); check its name.") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} must be text in UTF-8, got other bytes from byte {error.start} on; convert it."
        ) from None
    if not rows:
        raise UserError(f"{path} must hold at least one row, got none; add some.")
    return rows


def _jsonl_rows(path: Path) -> list[dict[str, Any]]:
    # Not `splitlines`: JSON may hold other line separators inside a string.
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [
        _checked(_parsed(line, path, number), f"{path}, line {number},")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _json_rows(path: Path) -> list[dict[str, Any]]:
    content = _parsed(path.read_text(encoding="utf-8-sig"), path, 1)
    if not isinstance(content, list):
        raise UserError(
            f"{path} must hold a list of JSON objects, got {type(content).__name__}; mend it, or "
            "name it .jsonl if each line is an object."
        )
    return [
        _checked(row, f"{path}, entry {number},") for number, row in enumerate(content, start=1)
    ]


def _parsed(text: str, path: Path, first_line_number: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line_number + error.lineno - 1
        raise UserError(
            f"{path}, line {line}, must be JSON, got none ({error.msg}); mend the line."
        ) from None


def _checked(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{place} must be a JSON object, got {type(row).__name__}; mend it.")
    return row


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} must be Parquet, got none ({error}); convert it.") from None
