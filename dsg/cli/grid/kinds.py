"""What kind of run a method of a benchmark grid is, and how the runs of its cells are set up."""

from collections.abc import Mapping
from typing import Any, Literal

from dsg.cli.configs import Config, value_at
from dsg.cli.grid.file import GUARD_KEY, Benchmark, Method, split_mode
from dsg.errors import UserError

# A model that has forgotten nothing, a guard of an SAE, or a model whose weights are changed.
Kind = Literal["base", "guard", "fit"]

_CSV_LOGGER = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "."}}
_WANDB_LOGGER = "lightning.pytorch.loggers.WandbLogger"
_PROJECT = "dynamic-sae-guardrails"


def kind_of(config: Config) -> Kind:
    """The kind of a runnable configuration."""
    if not str(value_at(config, "model.class_path")).endswith("EvaluationModule"):
        return "fit"
    return "guard" if value_at(config, GUARD_KEY) else "base"


def quiet() -> dict[str, Any]:
    """Values for a cell that nobody watches: it is repeated as a whole, and logs to a file."""
    return {
        "trainer.enable_progress_bar": False,
        "trainer.enable_checkpointing": False,
        "trainer.logger": [_CSV_LOGGER],
    }


def tracked(group: str, name: str) -> dict[str, Any]:
    """Values for a cell whose curves go to the tracker as well."""
    settings = {"project": _PROJECT, "group": group, "name": name}
    return {"trainer.logger": [_CSV_LOGGER, {"class_path": _WANDB_LOGGER, "init_args": settings}]}


def check_kinds(
    benchmark: Benchmark, methods: Mapping[str, Method], kinds: Mapping[str, Kind]
) -> None:
    """Refuses methods whose entries do not fit what they are.

    Args:
        benchmark: What the grid file says.
        methods: Its methods, every draw as one of its own.
        kinds: What each of them is.

    Raises:
        UserError: They do not, or the control is missing.
    """
    if "base" not in kinds.values():
        raise UserError(
            "`methods` must hold the model that forgets nothing, got only "
            f"{', '.join(benchmark.methods)}; add `base: {{config: ../evaluate/base.yaml}}`."
        )
    for name, method in methods.items():
        place, kind = f"`methods.{name}`", kinds[name]
        if kind == "base" and (method.grid or method.epochs):
            raise UserError(f"{place} evaluates a model as it is; remove its `grid` and `epochs`.")
        if kind == "guard" and method.epochs:
            raise UserError(f"{place} is a guard and is not trained; remove its `epochs`.")
        if kind == "guard" and any(not key.startswith(f"{GUARD_KEY}.") for key in method.grid):
            raise UserError(
                f"The grid of {place} must vary keys below {GUARD_KEY}, got "
                f"{', '.join(method.grid)}; move the others to `fixed`."
            )
        if method.settings_of and {kind, kinds[method.settings_of]} != {"guard"}:
            raise UserError(
                f"`settings_of` takes a guard's settings over to another guard, got it for {place} "
                f"and {method.settings_of!r}; use it for guards only."
            )
    attacked = [split_mode(name) for name in benchmark.attacked]
    for name, mode in attacked:
        if mode and kinds[name] != "guard":
            raise UserError(
                f"`attacked` names a mode for {name!r}, which is no guard; write {name!r} alone."
            )
    # Who attacks below a guard at test time, and not the guard, attacks the unchanged model.
    alike = not any(attack.guarded for attack in benchmark.attacks.values())
    if attacked and not any(
        kinds[name] == "base" or (alike and kinds[name] == "guard" and mode != "train_time")
        for name, mode in attacked
    ):
        raise UserError(
            "`attacked` must hold the model that has forgotten nothing, as the control, got "
            f"{', '.join(benchmark.attacked)}; add it."
        )
    for name in benchmark.sequences:
        if kinds[name] == "base":
            raise UserError(f"`sequences` must name methods that forget, got {name!r}; remove it.")
