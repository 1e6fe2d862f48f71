"""Pieces of work that run once each: a resumed run reads finished ones back."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from dsg.results import read_results, write_atomically

DONE_FILE = "stage.json"


class Stages:
    """Runs stages in folders of their own, tells about them in a line each, collects their rows.

    Args:
        run_dir: The run directory; stages lie under `stages/`.
        console: Where the lines go.

    Attributes:
        rows: Result rows of all stages so far.
    """

    def __init__(self, run_dir: Path, console: Console) -> None:
        self._root = run_dir / "stages"
        self._console = console
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
        started = time.monotonic()
        if done.is_file():
            note = "finished earlier"
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            result = work(folder) or {}
            write_atomically(done, json.dumps(result, sort_keys=True))
            note = f"{time.monotonic() - started:.0f} s"
        self._console.print(f"[bold]{title}[/bold]  {note}", highlight=False)
        if (folder / "results.jsonl").is_file():
            self.rows += read_results(folder)
        return json.loads(done.read_text(encoding="utf-8"))
