"""The cells of a benchmark grid: tuning, then the chosen settings, then evaluation and attacks.

Later cells depend on what earlier ones found, so each step reads the finished cells of the steps
before it; what failed there has no later cells.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from dsg.cli.configs import Config, changed, combinations, label, value_at, with_seed
from dsg.cli.grid.cells import Cell
from dsg.cli.grid.file import EPOCHS_KEY, GUARD_KEY, LR_KEY, Benchmark, Method, split_mode
from dsg.cli.grid.kinds import Kind, check_kinds, kind_of, quiet, tracked
from dsg.cli.grid.tuning import Choice, Try, best, validation_scores
from dsg.io import read_run_facts

TUNE_GUARDS = "dsg.cli.grid.work:tune_guards"
MODEL_FOLDER = "model"

_PLACE = ("hook_point", "sae", "sae_id")
_DOMAIN_KEY = "data.init_args.forget_domain"
_PASSES_KEY = "data.init_args.passes"


class Place(NamedTuple):
    """One seed and the domain that is to be forgotten."""

    seed: int
    domain: str

    def __str__(self) -> str:
        return f"seed_{self.seed}/{self.domain}"


@dataclass(frozen=True)
class Attacked:
    """What is attacked, how, and the cell that does it with one learning rate."""

    place: Place
    method: str
    mode: str | None
    attack: str
    lr: float
    cell: Cell


class Plan:
    """Cells of a benchmark grid.

    Args:
        benchmark: What the grid file says.
        configs: The runnable configurations that it names, by `str` of what it calls them.
        name: Of the grid; groups the attacks in the tracker.

    Raises:
        UserError: Methods, attacks and configurations do not fit each other.
    """

    def __init__(self, benchmark: Benchmark, configs: Mapping[str, Config], name: str) -> None:
        self.benchmark = benchmark
        self.name = name
        self.places = [Place(*pair) for pair in product(benchmark.seeds, benchmark.forget_domains)]
        self._configs = configs
        self.methods = {
            drawn: each
            for name, method in benchmark.methods.items()
            for drawn, each in _draws(name, method).items()
        }
        self.kinds: dict[str, Kind] = {
            name: kind_of(configs[str(method.config)]) for name, method in self.methods.items()
        }
        check_kinds(benchmark, self.methods, self.kinds)

    def first(self) -> dict[str, tuple[str, Config]]:
        """A command and a configuration of each kind of cell, to be checked before any is run."""
        place = self.places[0]
        configs = {}
        for name, method in self.benchmark.methods.items():
            values = combinations(method.grid)[0]
            command = "test" if kind_of(self._configs[str(method.config)]) != "fit" else "fit"
            configs[f"methods.{name}"] = (command, self._config(method, place, values))
        for name in self.benchmark.attacks:
            config = self._attack_config(place, self.base, None, name, 1.0)
            configs[f"attacks.{name}"] = ("fit", config)
        for name in self.benchmark.sequences:
            configs[f"sequences.{name}"] = ("fit", self._sequence_config(place, name, {}))
        return configs

    def tuning(self) -> list[Cell]:
        """All tries on validation facts; the guards of a place share a cell."""
        cells = []
        for place in self.places:
            if "guard" in self.kinds.values():
                cells.append(self._guards(place))
            for name in self._of_kind("fit"):
                cells += [cell for _, cell in self._fit_tries(place, name)]
        return cells

    def unlearning(self, run_dir: Path) -> list[Cell]:
        """The chosen settings of each method that changes weights, timed without evaluation."""
        cells = [
            self._chosen_fit(place, name, run_dir)
            for place in self.places
            for name in self._of_kind("fit")
        ]
        return [cell for cell in cells if cell is not None]

    def sequences(self, run_dir: Path) -> list[Cell]:
        """Requests in sequence; the domain that a place stands for plays no role in them."""
        cells = []
        for place, name in product(self.places, self.benchmark.sequences):
            chosen = self.choice(place, name, run_dir)
            if place.domain == self.benchmark.forget_domains[0] and chosen is not None:
                config = self._sequence_config(place, name, chosen[0].settings)
                cells.append(Cell(f"seed_{place.seed}/sequential/{name}", "fit", config))
        return cells

    def evaluations(self, run_dir: Path) -> list[Cell]:
        """Each method on test facts."""
        cells = []
        for place in self.places if self.benchmark.compared else ():
            for name, method in self.methods.items():
                source = self._source(place, name, run_dir)
                if source is None:
                    continue
                config = self._config(method, place, {})
                if self.kinds[name] == "fit":
                    base = self.methods[self.base]
                    config = changed(self._config(base, place, {}), self._model(source, place))
                elif self.kinds[name] == "guard":
                    config = changed(
                        config, self._artifact(source, name, value_at(config, GUARD_KEY))
                    )
                config = changed(config, {"model.init_args.method": name, **quiet()})
                after = [source.digest] if source.command != "test" else []
                cells.append(Cell(f"{place}/evaluate/{name}", "test", config, after))
        return cells

    def attacks(self, run_dir: Path) -> list[Attacked]:
        """Each attack with each learning rate, on test facts."""
        runs = []
        for place, attacked in product(self.places, self.benchmark.attacked):
            name, mode = split_mode(attacked)
            source = self._source(place, name, run_dir)
            if source is None:
                continue
            for attack, settings in self.benchmark.attacks.items():
                for lr in settings.lr:
                    config = self._attack_config(place, name, mode, attack, lr, source)
                    cell_name = f"{place}/{attack}/{attacked}/lr={lr:g}"
                    config = changed(config, tracked(self.name, cell_name))
                    after = [source.digest] if source.command != "test" else []
                    cell = Cell(cell_name, "fit", config, after)
                    runs.append(Attacked(place, name, mode, attack, lr, cell))
        return runs

    def choice(self, place: Place, name: str, run_dir: Path) -> tuple[Choice, list[Try]] | None:
        """What was chosen for a method and from which tries; None where tuning has failed.

        A method without anything to try has an empty choice.
        """
        method = self.methods[name]
        if self.kinds[name] == "guard":
            outcome = self._guards(place).outcome(run_dir)
            if outcome is None:
                return None
            tuned = outcome["guards"][name]
            tries = [(settings, scores) for settings, scores in tuned["tries"]]
            chosen = Choice(tuned["chosen"], {}, 0)
            return (best(tries) if tries else chosen), tries
        if not (method.grid or method.epochs):
            return Choice({}, {}, 0), []
        tries = []
        for values, cell in self._fit_tries(place, name):
            if not cell.is_finished(run_dir):
                return None
            rows = cell.rows(run_dir)
            for epoch in method.epochs or [self._default_epochs(method)]:
                counted = {EPOCHS_KEY: epoch} if method.epochs else {}
                tries.append(({**values, **counted}, validation_scores(rows, epoch)))
        return best(tries), tries

    def features(self, run_dir: Path) -> list[dict[str, Any]]:
        """Descriptions of the features of the first guard at the first place."""
        outcome = self._guards(self.places[0]).outcome(run_dir)
        return outcome["features"] if outcome else []

    def seconds(self, place: Place, name: str, run_dir: Path) -> float | None:
        """How long it took to unlearn with the chosen settings, without choosing or evaluating."""
        if self.kinds[name] == "guard":
            outcome = self._guards(place).outcome(run_dir)
            return outcome and outcome["guards"][name]["seconds"]
        cell = self._chosen_fit(place, name, run_dir) if self.kinds[name] == "fit" else None
        if cell is None or not cell.is_finished(run_dir):
            return None
        return read_run_facts(cell.folder(run_dir)).get("unlearn_seconds")

    def _of_kind(self, kind: Kind) -> list[str]:
        return [name for name, own in self.kinds.items() if own == kind]

    @property
    def base(self) -> str:
        """The method that forgets nothing."""
        return self._of_kind("base")[0]

    def _config(self, method: Method, place: Place, values: Mapping[str, Any]) -> Config:
        config = with_seed(self._configs[str(method.config)], place.seed)
        return changed(config, {**method.fixed, **values, _DOMAIN_KEY: place.domain})

    def _guards(self, place: Place) -> Cell:
        methods = {
            name: {
                "config": self._config(method, place, {}),
                "grid": method.grid,
                "settings_of": method.settings_of,
            }
            for name, method in self.methods.items()
            if self.kinds[name] == "guard"
        }
        return Cell(f"{place}/guards", TUNE_GUARDS, methods)

    def _fit_tries(self, place: Place, name: str) -> list[tuple[dict[str, Any], Cell]]:
        method = self.methods[name]
        if not (method.grid or method.epochs):
            return []
        tries = []
        for values in combinations(method.grid):
            epochs = {EPOCHS_KEY: max(method.epochs)} if method.epochs else {}
            config = changed(self._config(method, place, {**values, **epochs}), quiet())
            config = changed(config, {"data.init_args.val_split": "validation"})
            tries.append((values, Cell(f"{place}/tune/{name}/{label(values)}", "fit", config)))
        return tries

    def _chosen_fit(self, place: Place, name: str, run_dir: Path) -> Cell | None:
        choice = self.choice(place, name, run_dir)
        if choice is None:
            return None
        config = self._config(self.methods[name], place, choice[0].settings)
        config = changed(config, {"trainer.limit_val_batches": 0, **quiet()})
        return Cell(f"{place}/unlearn/{name}", "fit", config)

    def _source(self, place: Place, name: str, run_dir: Path) -> Cell | None:
        """The finished cell that has made what a method is; the evaluation itself for the base."""
        if self.kinds[name] == "base":
            config = self._config(self.methods[name], place, {})
            return Cell(f"{place}/evaluate/{name}", "test", config)
        guard = self.kinds[name] == "guard"
        cell = self._guards(place) if guard else self._chosen_fit(place, name, run_dir)
        return cell if cell is not None and cell.is_finished(run_dir) else None

    def _attack_config(
        self,
        place: Place,
        name: str,
        mode: str | None,
        attack: str,
        lr: float,
        source: Cell | None = None,
    ) -> Config:
        settings = self.benchmark.attacks[attack]
        config = with_seed(self._configs[str(settings.config)], place.seed)
        values = {
            "data.init_args.val_split": "test",
            **settings.fixed,
            **quiet(),
            _DOMAIN_KEY: place.domain,
            EPOCHS_KEY: self.benchmark.epochs,
            LR_KEY: lr,
            GUARD_KEY: None,
            "model.init_args.mode": "none",
            "model.init_args.method": name,
        }
        if source is not None and self.kinds[name] == "guard":
            guard = self._config(self.methods[name], place, {})
            values |= self._artifact(source, name, value_at(guard, GUARD_KEY))
            values["model.init_args.mode"] = mode or "test_time"
            values |= settings.guarded
        if source is not None and self.kinds[name] == "fit":
            values |= self._model(source, place)
        return changed(config, values)

    def _sequence_config(self, place: Place, name: str, settings: Mapping[str, Any]) -> Config:
        """A sequence with chosen settings; chosen epochs are passes through a request's text."""
        sequence = self.benchmark.sequences[name]
        prefix = f"{GUARD_KEY}." if self.kinds[name] == "guard" else ""
        values = {
            _PASSES_KEY if key == EPOCHS_KEY else f"{prefix}{key}": value
            for key, value in settings.items()
        }
        config = with_seed(self._configs[str(sequence.config)], place.seed)
        return changed(config, {**sequence.fixed, **values, **quiet()})

    def _model(self, source: Cell, place: Place) -> dict[str, Any]:
        method = source.name.rsplit("/", 1)[-1]
        base = self._config(self.methods[method], place, {})
        return {
            "model.init_args.model_name": source.path(MODEL_FOLDER),
            "model.init_args.base_model_name": value_at(base, "model.init_args.model_name"),
        }

    def _artifact(self, source: Cell, name: str, guard: Config) -> dict[str, Any]:
        """The guard that was chosen: beside it only the place of its SAE means anything."""
        place = {key: guard[key] for key in _PLACE if key in guard}
        return {GUARD_KEY: {**place, "artifact": source.path(name)}}

    def _default_epochs(self, method: Method) -> int:
        return value_at(self._configs[str(method.config)], EPOCHS_KEY) or 1


def _draws(name: str, method: Method) -> dict[str, Method]:
    """The draws of a method that has several, each as a method of its own."""
    if method.draws == 1:
        return {name: method}
    return {
        f"{name}_{draw}": replace(
            method, draws=1, fixed={**method.fixed, f"{GUARD_KEY}.draw": draw}
        )
        for draw in range(method.draws)
    }
