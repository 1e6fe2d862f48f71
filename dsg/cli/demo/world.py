"""`dsg demo` on the embedded benchmark: a grid of methods, attacks and sequences."""

import argparse
import sys
from typing import Any

from rich.console import Console

from dsg.cli.configs import Config
from dsg.cli.environment import available_cpus
from dsg.cli.grid.file import GUARD_KEY, LR_KEY, Attack, Benchmark, Method, Sequence
from dsg.cli.grid.plan import Plan
from dsg.cli.grid.recovery import SUMMARIES
from dsg.cli.grid.run import Rounds, run_benchmark
from dsg.cli.grid.workers import Workers
from dsg.cli.process import calm_libraries, resumable
from dsg.cli.tiny_world import HOOK_POINT
from dsg.io import write_results, write_run_facts
from dsg.io.run_directory import run_directory
from dsg.report import build_report, results_table

NUM_RANDOM_DRAWS = 5
# The same numbers of tries for every method: twelve.
TRIES = 12
_MAX_JOBS = 4  # each takes about a gigabyte
_STEERING_KEY = "model.init_args.objective.init_args.steering"
_PLACE = {"model_name": "tiny_world:0/model", "seed": 0}


def run(options: argparse.Namespace) -> int:
    """Run the demonstration and print its table.

    Returns:
        0, or 1 if a part of it has failed.
    """
    calm_libraries()
    console = Console()
    claim = run_directory(options.run_dir, overwrite=options.overwrite, resume=options.resume)
    with claim as folder, resumable():
        run_dir = folder.resolve()
        with Workers(num_jobs(), run_dir) as workers:
            rounds = Rounds(run_dir, workers, console)
            rows, _ = run_benchmark(Plan(demo_grid(options), demo_configs(), "demo"), rounds)
        write_results(run_dir, [row for row in rows if row["metric"] not in SUMMARIES])
        names = ("seeds", "forget_domains", "parts", "epochs")
        config = {name: getattr(options, name) for name in names}
        facts = {"command": ["dsg", *sys.argv[1:]], "config": config, "seconds": rounds.seconds}
        write_run_facts(run_dir, {**facts, "failures": rounds.failures})
        if rows:
            report = build_report(run_dir)
            console.print(results_table(run_dir))
            console.print(f"report: {report}", highlight=False, soft_wrap=True)
        return rounds.print_failures()


def num_jobs() -> int:
    """Processes of a demonstration."""
    return min(_MAX_JOBS, available_cpus())


def demo_grid(options: argparse.Namespace) -> Benchmark:
    """The grid of the demonstration.

    Args:
        options: `seeds`, `forget_domains`, `parts` and `epochs`.
    """
    methods = {
        "base": Method("base"),
        "dsg": _guard(
            "dsg",
            {
                "ratio_percentile": [85.0, 90.0, 95.0],
                "num_features": [20, 40],
                "threshold_percentile": [95.0, 98.0],
            },
        ),
        "farrell": _guard(
            "farrell",
            {
                "max_retain_frequency": [0.005, 0.02, 0.05],
                "num_features": [20, 40],
                "clamp_value": [-20.0, -40.0],
            },
        ),
        # Few features and a larger value, in proportion to the papers' -300 and -500.
        "clamp_prime": _guard(
            "clamp_prime",
            {
                "max_retain_frequency": [0.005, 0.02, 0.05],
                "num_features": [5, 10],
                "clamp_value": [-30.0, -60.0],
            },
        ),
        "refusal_clamp": _guard(
            "refusal_clamp",
            {
                "max_retain_frequency": [0.005, 0.02, 0.05],
                "num_features": [10, 20],
                "clamp_value": [-40.0, -100.0],
            },
            trigger_limit=0.05,
        ),
        "static_clamp": _as_dsg("static_clamp"),
        "dsg_window": _as_dsg("dsg_window", window_size=8),  # a question has about a dozen tokens
        "dsg_cusum": _as_dsg("dsg_cusum"),
        "dsg_near": _as_dsg("dsg_near"),
        "dsg_documents": Method(
            "guard", settings_of="dsg", fixed={"data.init_args.calibration": "documents"}
        ),
        "random": Method(
            "guard",
            settings_of="dsg",
            fixed={f"{GUARD_KEY}.method": "random"},
            draws=NUM_RANDOM_DRAWS,
        ),
        "rmu": Method("rmu", {_STEERING_KEY: [20.0, 60.0], LR_KEY: [3e-3, 1e-2]}, epochs=[1, 2, 3]),
    }
    relearns = "relearn" in options.parts
    attacks = {"relearn_full": Attack("full", [5e-4]), "relearn_lora": Attack("lora", [3e-3])}
    sequences = {"dsg": Sequence("dsg_sequence"), "rmu": Sequence("rmu_sequence")}
    return Benchmark(
        seeds=options.seeds,
        forget_domains=options.forget_domains,
        methods=methods,
        tries=TRIES,
        compared="evaluate" in options.parts,
        attacks=attacks if relearns else {},
        attacked=["dsg_test_time", "dsg_train_time", "rmu"] if relearns else [],
        sequences=sequences if "sequential" in options.parts else {},
        epochs=options.epochs,
    )


def demo_configs() -> dict[str, Config]:
    """The runs of the demonstration, by the name that its grid uses."""
    # -40 is about 0.7 of the residual norm; the accuracy hardly moves beyond -20.
    guard = {
        "sae": "tiny_world:0/sae",
        "hook_point": HOOK_POINT,
        "clamp_value": -40.0,
        "max_length": 128,
    }
    # Down projections alone forget far less on so small a model.
    objective = {
        "class_path": "dsg.objectives.RMU",
        "init_args": {"hook_point": HOOK_POINT, "steering": 20.0, "target": "mlp."},
    }
    clipping = {"gradient_clip_val": 1.0}
    texts = {"num_train_texts": 240}
    attack = {
        "allow_overlap": True,
        "val_split": "test",
        "num_train_texts": 60,
    }
    requests = {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3}
    return {
        "base": _config("Evaluation"),
        "guard": _config("Evaluation", {"guard": guard}),
        "rmu": _config("Unlearning", {"objective": objective}, texts, trainer=clipping),
        "full": _config("Relearning", {"adapter": "full"}, attack),
        "lora": _config("Relearning", {"adapter": "lora"}, attack),
        "dsg_sequence": _config(
            "Sequential", {"guard": guard}, texts, "TinyWorldRequests", requests
        ),
        "rmu_sequence": _config(
            "Sequential",
            {"objective": objective},
            texts,
            "TinyWorldRequests",
            {**requests, **clipping},
        ),
    }


def _guard(method: str, grid: dict[str, list[Any]], **fixed: Any) -> Method:
    settings = {f"{GUARD_KEY}.{key}": value for key, value in fixed.items()}
    values = {f"{GUARD_KEY}.{key}": values for key, values in grid.items()}
    return Method("guard", values, fixed={f"{GUARD_KEY}.method": method, **settings})


def _as_dsg(method: str, **fixed: Any) -> Method:
    """Another guard with the settings that were chosen for DSG."""
    settings = {f"{GUARD_KEY}.{key}": value for key, value in fixed.items()}
    return Method("guard", settings_of="dsg", fixed={f"{GUARD_KEY}.method": method, **settings})


def _config(
    module: str,
    settings: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    data_module: str = "TinyWorldData",
    trainer: dict[str, Any] | None = None,
) -> Config:
    return {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "num_sanity_val_steps": -1,
            **(trainer or {}),
        },
        "model": {
            "class_path": f"lightning_modules.{module}Module",
            "init_args": {**_PLACE, "model_label": "tiny_world", **(settings or {})},
        },
        "data": {
            "class_path": f"datamodules.{data_module}",
            "init_args": {**_PLACE, **(data or {})},
        },
    }
