"""Processes that import everything once and then take one cell of a grid after the other."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from dsg.cli.environment import prepare_environment
from dsg.cli.grid.cells import Cell, named_function
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
        self._pool: ProcessPoolExecutor | None = None
        self._others = set(multiprocessing.active_children())

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # An executor waits for what runs; whoever leaves the block does not.
        for process in set(multiprocessing.active_children()) - self._others:
            process.kill()
        self._close()

    def start(self, num_cells: int) -> None:
        """Let processes import what so many cells need while this one does something else."""
        for _ in range(min(self._jobs, num_cells)):
            self._submit(named_function, self._work)

    def run(self, cells: Sequence[Cell]) -> Iterator[Outcome]:
        """Do cells, in this order as far as processes are free, and tell of each when it ends.

        A process that dies takes the pool with it. Which cell killed it shows when those that were
        under way are done again, one by one: each has a second attempt, and no third.
        """
        waiting, again = deque(cells), deque[Cell]()
        suspects: set[str] = set()
        busy: dict[Future[str | None], Cell] = {}
        while waiting or again or busy:
            while again or waiting:
                alone = again or any(cell.name in suspects for cell in busy.values())
                if len(busy) >= (1 if alone else self._jobs):
                    break
                cell = (again or waiting).popleft()
                busy[self._submit(_attempt, self._work, cell, self._run_dir)] = cell
            done = wait(busy, return_when=FIRST_COMPLETED).done
            if any(isinstance(future.exception(), BrokenProcessPool) for future in done):
                done = wait(busy).done
                self._close()
            for future in done:
                cell = busy.pop(future)
                if not isinstance(future.exception(), BrokenProcessPool):
                    yield Outcome(cell, future.result())
                elif cell.name in suspects:
                    yield Outcome(cell, "Its process died twice; is memory short?")
                else:
                    suspects.add(cell.name)
                    again.append(cell)

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        if self._pool is not None:
            try:
                return self._pool.submit(function, *arguments)
            except BrokenProcessPool:  # a process has died that had nothing to do
                self._close()
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(self._jobs, context, _begin)
        return self._pool.submit(function, *arguments)

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _begin() -> None:
    """Prepare a process before it imports anything that computes."""
    # Ctrl-C reaches every process of the terminal; the grid's own ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    prepare_environment()


def _die_with_parent() -> None:
    """A resumed grid does the cells again, so nobody may be left at work on one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _attempt(work: str, cell: Cell, run_dir: Path) -> str | None:
    """Do a cell from the start; returns why it failed, if it did."""
    _redirect_output(cell.log(run_dir))
    started = time.monotonic()
    cell.clear(run_dir)
    try:
        outcome = named_function(work)(cell, run_dir)
    except UserError as error:
        return " ".join(str(error).split())
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        sys.stderr.flush()
        first = next(iter(str(error).strip().splitlines()), "no message")
        return f"{type(error).__name__}: {first} (log: {cell.log(run_dir)})."
    cell.finish(run_dir, time.monotonic() - started, outcome)
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
