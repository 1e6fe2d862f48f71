"""Work for the cells of the grid's tests; imports nothing heavy, so that a process starts fast."""

import os
import time
from pathlib import Path

from dsg.cli.grid.cells import Cell
from dsg.errors import UserError
from dsg.io.results import row, write_results


def work(cell: Cell, run_dir: Path) -> None:
    """Does what the cell's configuration says."""
    folder = cell.folder(run_dir)
    folder.mkdir(parents=True)
    (folder / "begun").write_text(os.environ["OMP_NUM_THREADS"])
    action = cell.config["action"]
    os.write(1, f"{action} in {os.getpid()}".encode())
    if action == "refuse":
        raise UserError("`lr` must be positive,\n got -1; raise it.")
    if action == "break":
        raise RuntimeError("a bug\nwith details")
    if action == "exit":
        raise SystemExit(3)
    if action == "die":
        os._exit(9)
    if action == "die_once" and not (run_dir / "died").exists():
        (run_dir / "died").touch()
        os._exit(9)
    if action == "wait":
        deadline = time.monotonic() + 60
        while not (run_dir / "died").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
    (folder / "pid").write_text(str(os.getpid()))
    if action == "hang":
        time.sleep(600)


def measure(cell: Cell, run_dir: Path) -> None:
    """Stands for a fit: a learning rate is what is measured, and a negative one is refused."""
    rate, seed = (cell.config["model"]["init_args"][name] for name in ("lr", "seed"))
    if rate < 0:
        raise UserError(f"`lr` must be positive, got {rate}; raise it.")
    fields = {"domain": "forget", "protocol": "cloze", "method": "tiny", "metric": "accuracy"}
    write_results(cell.folder(run_dir), [row(value=rate + seed, **fields)])


def measure_halves(cell: Cell, run_dir: Path) -> None:
    """Stands for a guarded evaluation: forgets more, and loses more, with a larger `lr`."""
    rate = cell.config["model"]["init_args"]["lr"]
    split = {"validate": "validation", "test": "test"}[cell.command]
    fields = {"protocol": "cloze", "metric": "accuracy", "n": 100, "split": split}
    accuracies = {("off", "forget"): 1, ("off", "retain"): 1}
    accuracies |= {("on", "forget"): 1 - rate, ("on", "retain"): 1 if rate < 0.5 else 0.9}
    rows = [
        row(guard=guard, domain=domain, value=value, **fields)
        for (guard, domain), value in accuracies.items()
    ]
    write_results(cell.folder(run_dir), rows)
