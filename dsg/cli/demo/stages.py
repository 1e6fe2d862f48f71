"""Pieces of work that run once each: a resumed run reads finished ones back."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from dsg.cli.demo.time_left import TimeLeft
from dsg.io import read_results, write_atomically

DONE_FILE = "stage.json"
_Result = TypeVar("_Result")


class Stages:
    """Runs stages in folders of their own, tells about them in a line each, collects their rows.

    Args:
        run_dir: The run directory; stages lie under `stages/`.
        console: Where the lines go.
        time_left: Where given, a stage is also named when it begins, with the time that is left.

    Attributes:
        rows: Result rows of all stages so far.
    """

    def __init__(self, run_dir: Path, console: Console, time_left: TimeLeft | None = None) -> None:
        self._root = run_dir / "stages"
        self._console = console
        self._time_left = time_left
        self.rows: list[dict[str, Any]] = []

    def folder(self, name: str) -> Path:
        """Where the stage of this name leaves its files."""
        return self._root / name

    def run(
        self, name: str, title: str, work: Callable[[Path], dict[str, Any] | None]
    ) -> dict[str, Any]:
        """Do a piece of work, unless an earlier run has finished it.

        Args:
            name: Folder below `stages/`, unique in the run.
            title: What the line says.
            work: Gets the empty folder; a `results.jsonl` that it leaves there is collected, and
                what it returns must be representable in JSON.

        Returns:
            What the work returned, now or earlier.
        """
        folder = self.folder(name)
        done = folder / DONE_FILE
        seconds, note = None, "finished earlier"
        if not done.is_file():
            self._begin(title)
            started = time.monotonic()
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            result = work(folder) or {}
            write_atomically(done, json.dumps(result, sort_keys=True))
            seconds = time.monotonic() - started
            note = f"{seconds:.0f} s"
        self._end(title, note)
        if self._time_left is not None:
            self._time_left.finish(name, seconds)
        if (folder / "results.jsonl").is_file():
            self.rows += read_results(folder)
        return json.loads(done.read_text(encoding="utf-8"))

    def watch(self, name: str, title: str, work: Callable[[], _Result]) -> _Result:
        """Do a piece of work that keeps its result elsewhere, and tell about it as of a stage."""
        self._begin(title)
        started = time.monotonic()
        result = work()
        self._end(title, f"{time.monotonic() - started:.0f} s")
        if self._time_left is not None:
            # What was found in a cache tells nothing of this machine.
            self._time_left.finish(name, None)
        return result

    def say(self, line: str) -> None:
        """Tell what a piece of work is at."""
        self._console.print(f"  {line} ...", highlight=False)

    def _begin(self, title: str) -> None:
        if self._time_left is not None:
            left = self._time_left.tell()
            self._console.print(f"{title} ... {left}".rstrip(), highlight=False)

    def _end(self, title: str, note: str) -> None:
        self._console.print(f"[bold]{title}[/bold]  {note}", highlight=False)
