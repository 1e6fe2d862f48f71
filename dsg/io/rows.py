"""Rows of the user's own files: JSON Lines, JSON, CSV and Parquet; and small tables in CSV."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

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


T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """The rows of a CSV file.

    Attributes:
        path: The file.
        rows: Its rows: cell by column, without outer blanks.
        aliases: What the file calls columns that are asked for under another name.
    """

    path: Path
    rows: list[dict[str, str]]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def name(self, column: str) -> str:
        """What the file calls a column."""
        return self.aliases.get(column, column)

    def require(self, columns: Sequence[str]) -> None:
        """Refuses a file without one of these columns.

        Raises:
            UserError: If one is missing.
        """
        wanted = [self.name(column) for column in columns]
        missing = [name for name in wanted if name not in self.rows[0]]
        if missing:
            raise UserError(
                f"{self.path} must have the columns {', '.join(wanted)}, misses "
                f"{', '.join(missing)}; add them."
            )

    def texts(self, column: str) -> list[str]:
        """A column's cells; empty where the file has no such column."""
        return [row.get(self.name(column), "") for row in self.rows]

    def numbers(self, column: str) -> list[float]:
        """A column of finite numbers.

        Raises:
            UserError: If a cell is none.
        """
        return [self._number(column, text) for text in self.texts(column)]

    def integers(self, column: str) -> list[int]:
        """A column of whole numbers, which other programs may have written as floats.

        Raises:
            UserError: If a cell is none.
        """
        numbers = self.numbers(column)
        for number in numbers:
            if not number.is_integer():
                raise self._bad(column, "a whole number", str(number))
        return [int(number) for number in numbers]

    def one(self, column: str, values: Sequence[T]) -> T:
        """The value that all rows have in a column.

        Args:
            column: Where the values come from.
            values: The column's values, as text or numbers.

        Raises:
            UserError: If they differ.
        """
        first, *others = dict.fromkeys(values)
        if others:
            raise UserError(
                f"all rows of {self.path} must have the same `{self.name(column)}`, got {first!r} "
                f"and {others[0]!r}; make one file for each."
            )
        return first

    def _number(self, column: str, text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise self._bad(column, "a finite number", text)
        return number

    def _bad(self, column: str, wanted: str, got: str) -> UserError:
        return UserError(
            f"`{self.name(column)}` must be {wanted} in each row of {self.path}, got {got!r}; "
            "correct it."
        )


def read_table(path: Path) -> Table:
    """Reads a CSV file with a header and at least one row; cells missing at the end are empty.

    Raises:
        UserError: If the file cannot be read, has no row, or a row has more cells than the header.
    """
    try:
        rows = csv.reader(io.StringIO(read_text(path), newline=""))
        lines = [[cell.strip() for cell in row] for row in rows if row]
    except csv.Error as error:
        raise UserError(
            f"{path} must be a CSV file, got another file ({error}); export it again."
        ) from error
    if len(lines) < 2:
        raise UserError(
            f"{path} must hold a header and at least one row, got {len(lines)} lines; add a row."
        )
    header, *cells = lines
    for line in cells:
        if len(line) > len(header):
            raise UserError(
                f"each row of {path} must have at most the header's {len(header)} cells, got "
                f"{len(line)} in {','.join(line)!r}; put text that holds a comma in quotes."
            )
    padded = [line + [""] * (len(header) - len(line)) for line in cells]
    return Table(path, [dict(zip(header, line, strict=True)) for line in padded])
