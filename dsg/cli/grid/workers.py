"""Processes that import everything once and then take one cell of a grid after the other."""

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from dsg.cli.environment import prepare_environment
from dsg.cli.grid.cells import Cell
from dsg.errors import UserError

# Does a cell in its folder; named by module and function, because a worker imports it by itself.
WORK = "dsg.cli.grid.work:work"


class Outcome(NamedTuple):
    """What became of a cell: `reason` is None, or one sentence about why it failed."""

    cell: Cell
    reason: str | None


class Workers:
    """Up to `jobs` processes, started when there is work for them; killed at the end of the block.

    Each computes on one thread, so that results do not depend on how many there are. Cells that
    were interrupted leave no mark and are done again by a resumed run.

    Args:
        jobs: Processes.
        run_dir: Directory of the grid.
        work: `module:function` that gets a cell and `run_dir`; None takes `WORK`.
    """

    def __init__(self, jobs: int, run_dir: Path, work: str | None = None) -> None:
        self._jobs = jobs
        self._run_dir = run_dir
        self._work = work or WORK
        self._idle: list[_Worker] = []
        self._busy: dict[_Worker, Cell] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in (*self._idle, *self._busy):
            worker.end()
        self._idle, self._busy = [], {}

    def run(self, cells: Sequence[Cell]) -> Iterator[Outcome]:
        """Do cells, in this order as far as processes are free, and tell of each when it ends."""
        waiting = deque(cells)
        while waiting or self._busy:
            while waiting and len(self._busy) < self._jobs:
                worker = self._idle.pop() if self._idle else _Worker(self._run_dir, self._work)
                self._busy[worker] = waiting.popleft()
                worker.take(self._busy[worker])
            by_connection = {worker.connection: worker for worker in self._busy}
            for connection in wait(list(by_connection)):
                worker = by_connection[connection]  # pyright: ignore[reportArgumentType]
                cell = self._busy.pop(worker)
                try:
                    reason = worker.connection.recv()
                except EOFError:
                    yield Outcome(cell, f"Its process died ({worker.end()}); is memory short?")
                    continue
                self._idle.append(worker)
                yield Outcome(cell, reason)


class _Worker:
    def __init__(self, run_dir: Path, work: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # Not a daemon: trackers of a run have processes of their own.
        self._process = context.Process(target=_serve, args=(theirs, str(run_dir), work))
        with _one_thread():
            self._process.start()
        theirs.close()

    def take(self, cell: Cell) -> None:
        self.connection.send(cell)

    def end(self) -> str:
        self.connection.close()
        self._process.kill()
        self._process.join()
        return f"exit code {self._process.exitcode}"


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started meanwhile compute on one thread each."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _serve(connection: Connection, run_dir: str, work: str) -> None:
    """Body of a process: does cells until the connection closes."""
    # Ctrl-C reaches every process of the terminal; the grid's own ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    prepare_environment()
    while True:
        try:
            cell: Cell = connection.recv()
        except (EOFError, OSError):
            return
        _redirect_output(cell.log(Path(run_dir)))
        connection.send(_attempt(work, cell, Path(run_dir)))


def _die_with_parent() -> None:
    """A resumed grid does the cells again, so nobody may be left at work on one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _attempt(work: str, cell: Cell, run_dir: Path) -> str | None:
    """Do a cell from the start; returns why it failed, if it did."""
    started = time.monotonic()
    cell.clear(run_dir)
    try:
        module, function = work.split(":")
        getattr(importlib.import_module(module), function)(cell, run_dir)
    except UserError as error:
        return " ".join(str(error).split())
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        sys.stderr.flush()
        first = next(iter(str(error).strip().splitlines()), "no message")
        return f"{type(error).__name__}: {first} (log: {cell.log(run_dir)})."
    cell.finish(run_dir, time.monotonic() - started)
    return None


def _redirect_output(path: Path) -> None:
    """From now on this process and the libraries in it write to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
