"""Cells of a grid: runs that are repeated only if something that they depend on has changed."""

import hashlib
import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsg.cli.configs import Config
from dsg.io import RESULTS_FILE, read_results, write_atomically

# Stands for the grid's run directory in a configuration, which therefore can be moved.
RUN_DIR = "{run_dir}"
CELLS_FOLDER = "cells"
LOGS_FOLDER = "logs"
DONE_FILE = "cell.json"


@dataclass(frozen=True)
class Cell:
    """One piece of work with a folder of its own.

    Attributes:
        name: Folder below `cells/`, unique in the grid.
        command: A Lightning command of `dsg`, or `module:function`, which gets the cell's folder,
            its configuration, and where configurations are written.
        config: The complete configuration, with `RUN_DIR` for the grid's directory.
        after: Digests of the cells whose files it reads.
    """

    name: str
    command: str
    config: Config
    after: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Changes with everything that decides what the cell does, but for the code."""
        content = json.dumps([self.command, self.config, sorted(self.after)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def path(self, file: str = "") -> str:
        """Where the cell leaves a file, for the configuration of another cell."""
        return "/".join(filter(None, (RUN_DIR, CELLS_FOLDER, self.name, file)))

    def folder(self, run_dir: Path) -> Path:
        """Where the cell leaves its files."""
        return run_dir / CELLS_FOLDER / self.name

    def log(self, run_dir: Path) -> Path:
        """What the cell said."""
        return run_dir / LOGS_FOLDER / f"{self.name}.txt"

    def is_finished(self, run_dir: Path) -> bool:
        """Whether this very cell was finished, now or by an earlier run."""
        return self._done(run_dir).get("digest") == self.digest

    def seconds(self, run_dir: Path) -> float:
        """How long the finished cell took."""
        return self._done(run_dir)["seconds"]

    def rows(self, run_dir: Path) -> list[dict[str, Any]]:
        """Result rows of the finished cell; none if it measured nothing."""
        folder = self.folder(run_dir)
        return read_results(folder) if (folder / RESULTS_FILE).is_file() else []

    def clear(self, run_dir: Path) -> None:
        """Remove what an earlier attempt has left."""
        shutil.rmtree(self.folder(run_dir), ignore_errors=True)

    def outcome(self, run_dir: Path) -> Any:
        """What the cell returned; None of a run of Lightning, and before the cell is finished."""
        return self._done(run_dir)["outcome"] if self.is_finished(run_dir) else None

    def finish(self, run_dir: Path, seconds: float, outcome: Any = None) -> None:
        """Note that the cell is finished, and what it returned, which JSON must know."""
        done = {"digest": self.digest, "seconds": round(seconds, 2), "outcome": outcome}
        write_atomically(self.folder(run_dir) / DONE_FILE, json.dumps(done) + "\n")

    def _done(self, run_dir: Path) -> dict[str, Any]:
        try:
            return json.loads((self.folder(run_dir) / DONE_FILE).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return {}


def named_function(name: str) -> Callable[..., Any]:
    """The function of a name such as `dsg.cli.grid.work:tune_guards`."""
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)
