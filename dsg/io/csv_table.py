"""Small CSV tables that people write: read whole, checked cell by cell."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from dsg.errors import UserError
from dsg.io.reading import read_text

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
