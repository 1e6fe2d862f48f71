"""Grid files: a plain sweep, or the benchmark that compares methods."""

import argparse
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from dsg.cli.config_errors import one_sentence
from dsg.cli.configs import Config, merged, read_config
from dsg.errors import UserError, check_each_once, check_seeds

GUARD_KEY = "model.init_args.guard"
LR_KEY = "model.init_args.lr"
EPOCHS_KEY = "trainer.max_epochs"
MODES = ("test_time", "train_time")

_FAST_TEXTS = {"data.init_args.num_train_texts": 16}


@dataclass(frozen=True)
class Sweep:
    """Every combination of values with every seed, each a run of its own."""

    command: Literal["fit", "validate", "test", "halves"]
    """What runs a cell: `fit`, `validate`, `test`, or `halves`: `validate` and `test`, from which
    the unlearning score of a guard's settings is made."""
    config: str | list[str]
    """The runnable configuration, relative to the grid file; several are laid over each other."""
    seeds: list[int]
    """Seeds of every combination; each also names the embedded benchmark of the run."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Values to try, by the dotted key of the configuration."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Values that differ from the configuration in all cells, by dotted key."""

    def __post_init__(self) -> None:
        check_seeds("seeds", self.seeds)
        _check_grid("grid", self.grid)

    def fast(self) -> "Sweep":
        """One seed, the first value of everything, one epoch."""
        fixed = {**self.fixed, **({EPOCHS_KEY: 1} if self.command == "fit" else {})}
        grid = {key: values[:1] for key, values in self.grid.items() if key != EPOCHS_KEY}
        return replace(self, seeds=self.seeds[:1], grid=grid, fixed=fixed)


@dataclass(frozen=True)
class Method:
    """A method and the settings that are tried for it on the validation half."""

    config: str | list[str]
    """The runnable configuration, relative to the grid file; several are laid over each other. One
    that evaluates a guard is tuned as a guard; one that evaluates no guard has nothing to tune; any
    other one is a `fit` that leaves a changed model behind."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Values to try, by the dotted key of the configuration."""
    epochs: list[int] | None = None
    """Epochs after which a `fit` counts as a try of its own; None takes the configuration's."""
    settings_of: str | None = None
    """Guard method whose chosen settings are taken over instead of trying any."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Values that differ from the configuration, by dotted key."""
    draws: int = 1
    """Draws of a random guard; the mean over more than one is reported in their place."""

    @property
    def num_tries(self) -> int:
        """Settings that are compared."""
        epochs = 1 if self.epochs is None else len(self.epochs)
        return epochs * math.prod(len(values) for values in self.grid.values())


@dataclass(frozen=True)
class Attack:
    """An attack, run with every learning rate; what the best one recovers is reported."""

    config: str | list[str]
    """The runnable configuration, relative to the grid file; several are laid over each other."""
    lr: list[float]
    """Learning rates of the attacker."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Values that differ from the configuration, by dotted key."""
    guarded: dict[str, Any] = field(default_factory=dict)
    """Values that differ as well where a guard is attacked."""


@dataclass(frozen=True)
class Sequence:
    """Forget requests one after another, with the settings chosen for the first forget domain."""

    config: str | list[str]
    """The runnable configuration, relative to the grid file; several are laid over each other."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Values that differ from the configuration, by dotted key."""


@dataclass(frozen=True)
class Benchmark:
    """Methods tuned on validation facts, compared on test facts, attacked, asked for more."""

    seeds: list[int]
    """Seeds; each has a world and a model of its own."""
    methods: dict[str, Method]
    """Method by the name that the results give it."""
    tries: int
    """Settings compared for every method that is tuned, epochs included."""
    forget_domains: list[str] = field(default_factory=lambda: ["pathogen"])
    """Domains of the embedded benchmark, each forgotten on its own."""
    attacks: dict[str, Attack] = field(default_factory=dict)
    """Attack by the name that the results give it."""
    attacked: list[str] = field(default_factory=list)
    """Methods to attack; a guard's name ends in `_test_time` or `_train_time`. Among them is the
    control: the model that forgets nothing, or a guard at test time whose attacker has no
    `guarded` values, because below it stands that very model."""
    sequences: dict[str, Sequence] = field(default_factory=dict)
    """Requests in sequence, by the method that answers them."""
    compared: bool = True
    """Whether methods are measured on test facts before anything else happens to them."""
    epochs: int = 5
    """Epochs of an attack; it is measured before the first and after every one."""

    def __post_init__(self) -> None:
        check_seeds("seeds", self.seeds)
        check_each_once("forget_domains", self.forget_domains)
        if self.epochs < 1:
            raise UserError(f"`epochs` of an attack must be at least 1, got {self.epochs}.")
        for name, method in self.methods.items():
            self._check_method(name, method)
        for name, attack in self.attacks.items():
            check_each_once(f"attacks.{name}.lr", attack.lr)
            if not all(0 < lr < math.inf for lr in attack.lr):
                raise UserError(
                    f"`attacks.{name}.lr` must be positive and finite, got {attack.lr}; mend it."
                )
        used = [("attacked", split_mode(name)[0]) for name in self.attacked]
        for key, name in (*used, *(("sequences", name) for name in self.sequences)):
            if name not in self.methods or self.methods[name].draws > 1:
                single = [name for name, method in self.methods.items() if method.draws == 1]
                raise UserError(
                    f"`{key}` must name entries of `methods`, got {name!r}; "
                    f"there are {', '.join(single)}."
                )
        if bool(self.attacks) != bool(self.attacked):
            raise UserError("`attacks` and `attacked` belong together, got only one; give both.")

    def _check_method(self, name: str, method: Method) -> None:
        place = f"methods.{name}"
        _check_grid(f"{place}.grid", method.grid)
        if method.epochs is not None and (
            not method.epochs or sorted(set(method.epochs)) != method.epochs or method.epochs[0] < 1
        ):
            raise UserError(
                f"`{place}.epochs` must be increasing numbers from 1, got {method.epochs}."
            )
        if method.draws < 1:
            raise UserError(f"`{place}.draws` must be at least 1, got {method.draws}.")
        source = method.settings_of
        if source is not None and (
            source not in self.methods
            or self.methods[source].draws > 1
            or method.grid
            or method.epochs
        ):
            raise UserError(
                f"`{place}.settings_of` must name another method and leaves nothing to try, got "
                f"{source!r}; remove `grid` and `epochs`, or choose one of {list(self.methods)}."
            )
        tuned = method.grid or method.epochs
        if tuned and method.num_tries != self.tries:
            raise UserError(
                f"Every method must be tuned with `tries` = {self.tries} settings, got "
                f"{method.num_tries} for `{place}` (values of its grid times epochs); change its "
                "grid."
            )

    def fast(self) -> "Benchmark":
        """One seed, domain, setting, attack and epoch, and few texts."""
        methods = {}
        for name, method in self.methods.items():
            grid = {key: values[:1] for key, values in method.grid.items()}
            epochs, fixed = (None, {}) if method.epochs is None else ([1], _FAST_TEXTS)
            fixed = {**method.fixed, **fixed}
            methods[name] = replace(method, grid=grid, epochs=epochs, fixed=fixed, draws=1)
        attacks = {
            name: replace(attack, lr=attack.lr[:1], fixed={**attack.fixed, **_FAST_TEXTS})
            for name, attack in list(self.attacks.items())[:1]
        }
        return replace(
            self,
            seeds=self.seeds[:1],
            forget_domains=self.forget_domains[:1],
            methods=methods,
            tries=1,
            attacks=attacks,
            epochs=1,
        )


def split_mode(attacked: str) -> tuple[str, str | None]:
    """`dsg_train_time` is the method `dsg` in the mode `train_time`; None where none is named."""
    for mode in MODES:
        if attacked.endswith(f"_{mode}"):
            return attacked.removesuffix(f"_{mode}"), mode
    return attacked, None


def check_keys(raw: Any) -> None:
    """Refuses what the parser of the command line would drop without a word.

    Args:
        raw: Content of a grid file.

    Raises:
        UserError: A method or an attack has an unknown entry.
    """
    for section, kind in (("methods", Method), ("attacks", Attack), ("sequences", Sequence)):
        entries = raw.get(section) if isinstance(raw, Mapping) else None
        for name, entry in entries.items() if isinstance(entries, Mapping) else ():
            allowed = [item.name for item in fields(kind)]
            unknown = sorted(set(entry) - set(allowed)) if isinstance(entry, Mapping) else []
            if unknown:
                raise UserError(
                    f"`{section}.{name}` has the unknown entry {unknown[0]!r}; "
                    f"use only {', '.join(allowed)}."
                )


def _check_grid(name: str, grid: Mapping[str, Any]) -> None:
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"`{name}` must list values for {key!r}, got {values!r}.")
        if any(values.count(value) > 1 for value in values):
            raise UserError(f"`{name}` must list each value for {key!r} once, got {values!r}.")


Grid = Sweep | Benchmark


def read_grid(path: Path) -> Grid:
    """Read a grid file; one with `methods` is a benchmark, any other one a sweep.

    Raises:
        UserError: The file cannot be read, or what it says is wrong.
    """
    raw = read_config(path)
    kind = Benchmark if "methods" in raw else Sweep
    check_keys(raw)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, None)
    try:
        parsed: Any = parser.parse_path(str(path))
    except argparse.ArgumentError as error:
        raise UserError(f"The grid {str(path)!r}: {one_sentence(str(error), 'mend it')}") from None
    return kind(**vars(parser.instantiate(parsed)))


def named_configs(grid: Grid, path: Path) -> dict[str, Config]:
    """The runnable configurations that a grid names, by `str` of what it calls them.

    Args:
        grid: What the file says.
        path: Where it lies; names are relative to its folder.

    Raises:
        UserError: One cannot be read.
    """
    return {
        str(names): merged(
            read_config(path.parent / name)
            for name in ([names] if isinstance(names, str) else names)
        )
        for names in _names(grid)
    }


def _names(grid: Grid) -> Iterable[str | list[str]]:
    if isinstance(grid, Sweep):
        return [grid.config]
    entries = (*grid.methods.values(), *grid.attacks.values(), *grid.sequences.values())
    return [entry.config for entry in entries]
