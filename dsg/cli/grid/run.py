"""Runs the cells of a grid, round after round, and writes what they found."""

import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from dsg.cli.configs import (
    Config,
    benchmark_seeds,
    changed,
    combinations,
    label,
    map_strings,
    with_seed,
)
from dsg.cli.grid.cells import CELLS_FOLDER, RUN_DIR, Cell
from dsg.cli.grid.file import EPOCHS_KEY, Grid, Sweep, named_configs
from dsg.cli.grid.kinds import quiet
from dsg.cli.grid.plan import Plan
from dsg.cli.grid.recovery import UNLEARNING_SCORE, mean_over_draws, score_rows, sum_up
from dsg.cli.grid.tables import attack_table, sweep_table
from dsg.cli.grid.work import instantiate, write_config
from dsg.cli.grid.workers import Workers
from dsg.cli.lightning_cli import resolve_benchmark, run_name
from dsg.evaluation import read_items
from dsg.io import ITEMS_FILE, read_run_facts, row, write_results, write_run_facts
from dsg.report import (
    TABLE_FILE,
    ChosenSettings,
    Densities,
    build_report,
    results_table,
    save_overview_png,
    write_drawn,
    write_table,
)

OVERVIEW_FILE = "overview.png"


class Rounds:
    """Does cells that depend on earlier ones; what fails is told at the end.

    Args:
        run_dir: Directory of the grid.
        workers: Processes that do the cells.
        console: Where lines and bars go.

    Attributes:
        failures: One sentence by the name of a failed cell.
        seconds: How long each cell took, when it was done.
    """

    def __init__(self, run_dir: Path, workers: Workers, console: Console) -> None:
        self.run_dir = run_dir
        self.failures: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.workers = workers
        self._console = console

    def run(self, title: str, cells: Sequence[Cell]) -> None:
        """Do the cells that no earlier run has finished."""
        started = time.monotonic()
        waiting = [cell for cell in cells if not cell.is_finished(self.run_dir)]
        with Progress(console=self._console, transient=True) as progress:
            bar = progress.add_task(title, total=len(cells), completed=len(cells) - len(waiting))
            for cell, reason in self.workers.run(waiting):
                progress.advance(bar)
                if reason is not None:
                    self.failures[cell.name] = reason
        done = [cell for cell in cells if cell.is_finished(self.run_dir)]
        self.seconds |= {cell.name: cell.seconds(self.run_dir) for cell in done}
        counts = {
            f"{len(cells)} cells": True,
            f"{len(cells) - len(waiting)} finished earlier": len(waiting) < len(cells),
            f"{len(cells) - len(done)} failed": len(done) < len(cells),
            f"{time.monotonic() - started:.0f} s": bool(waiting),
        }
        summary = ", ".join(text for text, holds in counts.items() if holds)
        self._console.print(f"[bold]{title}[/bold]  {summary}", highlight=False)

    def print_failures(self) -> int:
        """Say why cells have failed; returns the exit status that this means."""
        for name, reason in self.failures.items():
            line = f"[bold red]failed[/bold red] {escape(f'{name}: {reason}')}"
            self._console.print(line, soft_wrap=True)
        return 1 if self.failures else 0


def run_grid(grid: Grid, path: Path, run_dir: Path, jobs: int, console: Console) -> int:
    """Run all cells of a grid and write its results.

    Args:
        grid: What the grid file says.
        path: The file.
        run_dir: Claimed directory of the grid.
        jobs: Processes at a time.
        console: Where lines, bars and tables go.

    Returns:
        0, or 1 if a cell has failed.

    Raises:
        UserError: A configuration does not fit; nothing has been run then.
    """
    configs = named_configs(grid, path)
    with Workers(jobs, run_dir) as workers:
        rounds = Rounds(run_dir, workers, console)
        if isinstance(grid, Sweep):
            rows = _run_sweep(grid, configs[str(grid.config)], rounds)
            times: list[dict[str, Any]] = []
        else:
            plan = Plan(grid, configs, run_name(path))
            rows, times = run_benchmark(plan, rounds)
    write_results(run_dir, rows)
    lines = write_table(run_dir, [*rows, *times])
    facts = {"command": ["dsg", *sys.argv[1:]], "grid": path.name, "jobs": jobs}
    write_run_facts(run_dir, {**facts, "seconds": rounds.seconds, "failures": rounds.failures})
    if isinstance(grid, Sweep):
        console.print(sweep_table(lines))
        for score in rows:
            if score["metric"] == UNLEARNING_SCORE:
                console.print(
                    f"unlearning score {score['value']:.3f} [{score['low']:.3f}, "
                    f"{score['high']:.3f}] (seed {score['seed']}, n {score['n']}), chosen on "
                    f"validation questions: {score['experiment']}",
                    highlight=False,
                )
    elif rows:
        console.print(results_table(run_dir))
        console.print(attack_table(lines))
        report = build_report(run_dir)
        save_overview_png(run_dir, run_dir / OVERVIEW_FILE)
        console.print(f"report: {report}", highlight=False, soft_wrap=True)
    console.print(f"table: {run_dir / TABLE_FILE}", highlight=False, soft_wrap=True)
    return rounds.print_failures()


def _run_sweep(grid: Sweep, config: Config, rounds: Rounds) -> list[dict[str, Any]]:
    commands = ("validate", "test") if grid.command == "halves" else (grid.command,)
    in_halves = len(commands) > 1
    cells: list[tuple[str, int, Cell]] = []
    for values in combinations(grid.grid):
        for seed in grid.seeds:
            base = changed(changed(with_seed(config, seed), quiet()), {**grid.fixed, **values})
            name = label(values)
            for command in commands:
                folder = f"{name}/seed_{seed}" + (f"/{command}" if in_halves else "")
                cells.append((name, seed, Cell(folder, command, base)))
    first = {f"the sweep ({command})": (command, cells[0][2].config) for command in commands}
    _prepare(first, [cell for *_, cell in cells])
    rounds.run("sweep", [cell for *_, cell in cells])
    rows = [
        {**measurement, "experiment": name, "seed": seed}
        for name, seed, cell in cells
        if cell.is_finished(rounds.run_dir)
        for measurement in cell.rows(rounds.run_dir)
    ]
    return [*rows, *score_rows(rows)] if in_halves else rows


def run_benchmark(plan: Plan, rounds: Rounds) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Do all cells of a benchmark, and write what its report shows beside the results.

    Returns:
        Result rows, and how long unlearning took.

    Raises:
        UserError: A configuration does not fit; nothing has been run then.
    """
    run_dir = rounds.run_dir
    tuning = plan.tuning()
    rounds.workers.start(sum(not cell.is_finished(run_dir) for cell in tuning))
    _prepare(plan.first(), tuning)
    rounds.run("tuning", tuning)
    sequences = plan.sequences(run_dir)
    rounds.run("unlearning", [*sequences, *plan.unlearning(run_dir)])
    evaluations, attacks = plan.evaluations(run_dir), plan.attacks(run_dir)
    # Attacks take longest; what is left for the end is short.
    rounds.run("attacks and evaluation", [attacked.cell for attacked in attacks] + evaluations)
    recovery = sum_up(attacks, run_dir, plan.base)
    rows = recovery.rows + _rows(sequences, run_dir)
    for name, method in plan.benchmark.methods.items():
        names = {name} if method.draws == 1 else {f"{name}_{i}" for i in range(method.draws)}
        measured = _rows([c for c in evaluations if c.name.rsplit("/", 1)[1] in names], run_dir)
        rows += measured if method.draws == 1 else mean_over_draws(measured, name, method.draws)
    rows = [{**measurement, "experiment": plan.name} for measurement in rows]
    times = _times(plan, run_dir)
    write_drawn(
        run_dir,
        densities=_densities(plan, run_dir),
        features=plan.features(run_dir),
        settings=_chosen(plan, run_dir),
        tries=_tries(plan, run_dir),
        attempts=recovery.attempts,
        times=times,
    )
    return rows, times


def _rows(cells: Iterable[Cell], run_dir: Path) -> list[dict[str, Any]]:
    done = [cell for cell in cells if cell.is_finished(run_dir)]
    return [measurement for cell in done for measurement in cell.rows(run_dir)]


def _densities(plan: Plan, run_dir: Path) -> dict[str, Densities]:
    """What is behind the gate of the first guard, for the report."""
    evaluations = run_dir / CELLS_FOLDER / str(plan.places[0]) / "evaluate"
    for name in (name for name, kind in plan.kinds.items() if kind == "guard"):
        folder = evaluations / name
        return {name: densities_of(folder)} if (folder / ITEMS_FILE).is_file() else {}
    return {}


def densities_of(folder: Path) -> Densities:
    """The densities behind a guard's gate that a finished evaluation measured, and the threshold.

    Args:
        folder: Of a `test` run of a guard; passages count where there are no questions.
    """
    items = [item for item in read_items(folder) if item["guard"] == "on"]
    kind = "questions" if any(item["kind"] == "questions" for item in items) else "passages"
    domains: dict[str, list[float]] = {}
    for item in items:
        if item["kind"] == kind:
            domains.setdefault(item["domain"], []).append(item["density"])
    return Densities(read_run_facts(folder)["guard"]["threshold"], domains)


def _prepare(configs: dict[str, tuple[str, Config]], cells: Iterable[Cell]) -> None:
    """Check a configuration of each kind, and train the embedded benchmarks that are missing."""
    with tempfile.TemporaryDirectory() as folder:
        for number, (_, config) in enumerate(configs.values()):
            placed = map_strings(config, lambda text: text.replace(RUN_DIR, folder))
            instantiate(write_config(Path(folder) / f"{number}.yaml", placed))
    # Here, one by one, because training uses more threads than a worker has.
    for seed in sorted({seed for cell in cells for seed in benchmark_seeds(cell.config)}):
        resolve_benchmark(f"tiny_world:{seed}/model")


def _tries(plan: Plan, run_dir: Path) -> list[dict[str, Any]]:
    """One line per setting that was tried on validation facts."""
    lines = []
    for place in plan.places:
        for name in plan.kinds:
            choice = plan.choice(place, name, run_dir)
            for settings, scores in choice[1] if choice else ():
                lines.append(
                    {"seed": place.seed, "forget_domain": place.domain, "method": name}
                    | {"settings": label(settings), **scores}
                    | {"chosen": settings == choice[0].settings if choice else False}
                )
    return lines


def _chosen(plan: Plan, run_dir: Path) -> list[ChosenSettings]:
    """What was chosen for the first seed and domain, for the report."""
    choices = {name: plan.choice(plan.places[0], name, run_dir) for name in plan.kinds}
    return [
        ChosenSettings(name, _short(choice[0].settings), choice[0].tried, choice[0].validation)
        for name, choice in choices.items()
        if choice and choice[1]
    ]


def _short(settings: dict[str, Any]) -> dict[str, Any]:
    names = {EPOCHS_KEY: "epochs"}
    return {names.get(key, key.rsplit(".", 1)[-1]): value for key, value in settings.items()}


def _times(plan: Plan, run_dir: Path) -> list[dict[str, Any]]:
    """How long unlearning took, as rows of the table; times are no part of the results."""
    times = []
    for place, name in product(plan.places, plan.kinds):
        measured = {"metric": "seconds_to_unlearn", "value": plan.seconds(place, name, run_dir)}
        columns = {"method": name, "seed": place.seed, "dataset": f"tiny_world/{place.domain}"}
        times.append(row(experiment=plan.name, **columns, **measured))
    return times
