"""What a run has found out so far, on disk: a killed run goes on after its last finished batch.

Every rank of every attempt appends to a file of its own, a line per batch, so that nothing is ever
written into the middle of a file that another process, or a dead one, has left.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsg.errors import UserError
from dsg.io.atomic import write_atomically

FOLDER = "outcomes"
_log = logging.getLogger(__name__)
_SETTINGS = "settings.json"


def append_line(path: Path, content: Mapping[str, Any]) -> None:
    """Append a line of JSON; it survives whatever happens afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")  # ends what a dead process has begun
        file.write(json.dumps(content, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[Any]:
    """The lines of a JSONL file; one that a killed process has left half-written is passed over."""
    lines = []
    content = path.read_bytes() if path.is_file() else b""
    for line in content.splitlines(keepends=True):
        if line.endswith(b"\n"):
            try:
                lines.append(json.loads(line))
            except ValueError:
                _log.warning("A line of %s is half-written and is passed over.", path.name)
    return lines


class Journal:
    """Outcomes of the items of a run, by their ids; an outcome is whatever JSON can hold.

    Args:
        folder: Of this run alone; all ranks share it.
        rank: Of this process.

    Attributes:
        known: Outcomes that were on disk when `open` was called.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.known: dict[int, Any] = {}
        self._folder = folder
        self._rank = rank
        self._file = folder / "none"

    def open(self, settings: Mapping[str, Any]) -> None:
        """Read what earlier attempts have left. No rank may append before all have opened.

        Args:
            settings: What decides the outcomes, in plain values.

        Raises:
            UserError: The earlier attempts had other settings.
        """
        self._check(settings)
        self.known = self.read()
        attempts = [int(path.stem.split("-")[0]) for path in self._paths()]
        attempt = max(attempts, default=0) + 1
        self._file = self._folder / f"{attempt}-{self._rank}.jsonl"

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Note the settings; for one rank, after all have opened."""
        if not (self._folder / _SETTINGS).is_file():
            write_atomically(self._folder / _SETTINGS, json.dumps(settings, indent=2))

    def append(self, ids: Sequence[int], outcomes: Sequence[Any]) -> None:
        """Keep the outcomes of a batch; they survive whatever happens afterwards."""
        append_line(self._file, {"ids": list(ids), "outcomes": list(outcomes)})

    def read(self) -> dict[int, Any]:
        """The outcomes of all attempts and ranks; of an item answered twice the first counts."""
        read: dict[int, Any] = {}
        for path in self._paths():
            for batch in read_lines(path):
                for id, outcome in zip(batch["ids"], batch["outcomes"], strict=True):
                    read.setdefault(id, outcome)
        return read

    def _paths(self) -> list[Path]:
        paths = self._folder.glob("*-*.jsonl")
        return sorted(paths, key=lambda path: tuple(map(int, path.stem.split("-"))))

    def _check(self, settings: Mapping[str, Any]) -> None:
        path = self._folder / _SETTINGS
        if not path.is_file():
            return
        saved = json.loads(path.read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(settings))
        differ = sorted(name for name in {*saved, *wanted} if saved.get(name) != wanted.get(name))
        if differ:
            raise UserError(
                f"the run in {str(self._folder.parent)!r} can only be continued as it was begun, "
                f"but {', '.join(differ)} changed since; restore it or use --overwrite."
            )
