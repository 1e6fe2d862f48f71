"""Rows of the user's own files: JSON Lines, JSON, CSV and Parquet."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dsg.errors import UserError
from dsg.io.atomic import whole_file
from dsg.io.reading import parse_json, read_bytes, read_text

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
    rows = readers[path.suffix.lower()](path)
    if not rows:
        raise UserError(f"{path} must hold at least one row, got none; add some.")
    return rows


def write_parquet(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows in one atomic step; columns that a row lacks are null."""
    import pyarrow  # here, because it takes a while to import
    import pyarrow.parquet

    rows = list(rows)
    names = list({name: None for row in rows for name in row})
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    with whole_file(path) as file:
        pyarrow.parquet.write_table(table, file)
    return path


def _jsonl_rows(path: Path) -> list[dict[str, Any]]:
    # Not `splitlines`: JSON may hold other line separators inside a string.
    lines = read_text(path).split("\n")
    return [
        _checked(parse_json(line, f"{path}, line {number}"), f"{path}, line {number},")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _json_rows(path: Path) -> list[dict[str, Any]]:
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, list):
        raise UserError(
            f"{path} must hold a list of JSON objects, got {type(content).__name__}; mend it, or "
            "name it .jsonl if each line is an object."
        )
    return [
        _checked(row, f"{path}, entry {number},") for number, row in enumerate(content, start=1)
    ]


def _checked(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{place} must be a JSON object, got {type(row).__name__}; mend it.")
    return row


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    try:
        return list(csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise UserError(f"{path} must be CSV, got none ({error}); export it again.") from None


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(pyarrow.BufferReader(read_bytes(path))).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} must be Parquet, got none ({error}); convert it.") from None
