"""What a grid file may say, and every grid file of the repository."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dsg.cli.configs import changed, combinations, map_strings, with_seed
from dsg.cli.grid.file import Attack, Benchmark, Method, Sweep, named_configs, read_grid, split_mode
from dsg.cli.grid.plan import Plan
from dsg.cli.grid.work import instantiate, write_config
from dsg.errors import UserError

GRIDS = Path(__file__).parents[4] / "configs" / "grids"
FILES = sorted(GRIDS.rglob("*.yaml"))
# Cells of the papers' grids: the product of the values in the table.
TABLES = {
    "table_3_dsg": 2 * 3 * 8,
    "table_4_rmu": 10 * 7 * 2 * 2,
    "table_5_scrub": 6 * 3 * 2 * 2,
    "table_6_ssd": 6 * 6,
    "table_7_static_clamp": 5 * 6 * 5,
    "table_8_grad_diff": 2 * 5,
    "table_9_npo": 3 * 2 * 2,
}

METHODS = {
    "base": {"config": "base.yaml"},
    "dsg": {"config": "dsg.yaml", "grid": {"model.init_args.guard.num_features": [5, 20]}},
    "rmu": {"config": "rmu.yaml", "grid": {"model.init_args.lr": [3e-3]}, "epochs": [1, 2]},
}
BENCHMARK = {
    "seeds": [0, 1],
    "tries": 2,
    "methods": METHODS,
    "attacks": {"relearn_full": {"config": "attack.yaml", "lr": [1e-3, 2e-3]}},
    "attacked": ["base", "dsg_train_time", "rmu"],
}
SWEEP = {"command": "fit", "config": "rmu.yaml", "seeds": [0], "grid": {"model.init_args.lr": [1]}}


def read(tmp_path, content):
    path = tmp_path / "grid.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return read_grid(path)


def test_a_sweep_and_a_benchmark_are_told_apart(tmp_path):
    sweep, benchmark = read(tmp_path, SWEEP), read(tmp_path, BENCHMARK)
    assert isinstance(sweep, Sweep)
    assert isinstance(benchmark, Benchmark)
    assert benchmark.methods["rmu"] == Method("rmu.yaml", {"model.init_args.lr": [0.003]}, [1, 2])
    assert benchmark.attacks == {"relearn_full": Attack("attack.yaml", [1e-3, 2e-3])}
    assert benchmark.forget_domains == ["pathogen"]


def test_numbers_are_read_as_the_command_line_reads_them(tmp_path):
    grid = read(
        tmp_path, "command: fit\nconfig: a.yaml\nseeds: [0]\ngrid: {x.lr: [3e-3, none, null]}\n"
    )
    assert isinstance(grid, Sweep)
    assert grid.grid == {"x.lr": [0.003, "none", None]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "`seeds` must list at least one value"),
        ({"seeds": [0, 0]}, "none twice"),
        ({"seeds": 3}, "`seeds` must be a list, got '3'"),
        ({"tries": 3}, r"`tries` = 3 settings, got 2 for `methods.dsg`"),
        ({"epochs": 0}, "`epochs` of an attack must be at least 1, got 0"),
        ({"colour": "red"}, "there is no option 'colour'"),
        ({"attacked": ["npo"]}, "`attacked` must name entries of `methods`, got 'npo'"),
        ({"attacked": []}, "`attacks` and `attacked` belong together"),
        (
            {"attacks.relearn_full.lr": [0.0]},
            "relearn_full.lr` must be positive and finite",
        ),
        ({"attacks.relearn_full.rate": 1}, "unknown entry 'rate'"),
        ({"methods.rmu.grids": {}}, "`methods.rmu` has the unknown entry 'grids'"),
        ({"methods.rmu.epochs": [2, 1]}, "must be increasing numbers from 1"),
        ({"methods.rmu.epochs": [0, 1]}, "must be increasing numbers from 1"),
        ({"methods.rmu.grid": {"a.b": []}}, "must list values for 'a.b'"),
        ({"methods.rmu.grid": {"a.b": [1, 1]}}, "each value for 'a.b' once"),
        ({"methods.dsg.settings_of": "npo"}, "`methods.dsg.settings_of` must name another method"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, changed(BENCHMARK, changes))
    assert "\n" not in str(caught.value)


def test_an_unknown_command_of_a_sweep(tmp_path):
    with pytest.raises(UserError, match="got 'train'"):
        read(tmp_path, {**SWEEP, "command": "train"})


def test_a_missing_configuration_is_named(tmp_path):
    grid = read(tmp_path, SWEEP)
    with pytest.raises(UserError, match=r"rmu\.yaml' cannot be read"):
        named_configs(grid, tmp_path / "grid.yaml")


def test_epochs_count_as_tries():
    assert Method("a", {"x": [1, 2], "y": [1, 2]}, [1, 2, 3]).num_tries == 12
    assert Method("a", {"x": [1, 2]}).num_tries == 2


def test_fast_keeps_every_method_once(tmp_path):
    grid = read(tmp_path, BENCHMARK)
    assert isinstance(grid, Benchmark)
    fast = grid.fast()
    assert (fast.seeds, fast.tries, fast.epochs) == ([0], 1, 1)
    assert fast.methods.keys() == grid.methods.keys()
    assert fast.methods["rmu"].epochs == [1]
    assert {method.num_tries for method in fast.methods.values()} == {1}
    assert fast.attacks["relearn_full"].lr == [1e-3]
    sweep = read(tmp_path, {**SWEEP, "seeds": [3, 4], "grid": {"a": [1, 2], "b": [5]}})
    assert sweep.fast() == replace(
        sweep, seeds=[3], grid={"a": [1], "b": [5]}, fixed={"trainer.max_epochs": 1}
    )


@pytest.mark.parametrize(
    ("attacked", "expected"),
    [
        ("dsg_test_time", ("dsg", "test_time")),
        ("dsg_near_train_time", ("dsg_near", "train_time")),
        ("static_clamp", ("static_clamp", None)),
    ],
)
def test_split_mode(attacked, expected):
    assert split_mode(attacked) == expected


def test_all_grids_are_found():
    names = {path.stem for path in FILES}
    assert names == {"tiny_world", "long_attack", "evading", *TABLES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_grid_of_the_repository_fits_its_configurations(path, tmp_path):
    """Each kind of cell is instantiated by the command line's own parser; nothing is loaded."""
    first_line = path.read_text().splitlines()[0]
    assert first_line == f"# dsg grid configs/grids/{path.relative_to(GRIDS).as_posix()}"
    grid = read_grid(path)
    configs = named_configs(grid, path)
    if isinstance(grid, Sweep):
        cells = combinations(grid.grid)
        assert len(cells) == TABLES[path.stem]
        base = with_seed(configs[str(grid.config)], grid.seeds[0])
        # The first and the last of them have every value that is an end of its list.
        checked = [changed(base, {**grid.fixed, **values}) for values in (cells[0], cells[-1])]
    else:
        plan = Plan(grid, configs, "name")
        checked = [config for _, config in plan.first().values()]
        assert len(plan.tuning()) >= len(grid.seeds)
    for number, config in enumerate(checked):
        placed = map_strings(config, lambda text: text.replace("{run_dir}", str(tmp_path)))
        module, data = instantiate(write_config(tmp_path / f"{number}.yaml", placed))
        assert module is not None
        assert data is not None


@pytest.mark.parametrize("name", ["tiny_world", "long_attack", "evading"])
def test_the_benchmark_tunes_every_method_alike(name):
    grid = read_grid(GRIDS / f"{name}.yaml")
    assert isinstance(grid, Benchmark)
    assert len(grid.seeds) >= 3
    for method in grid.methods.values():
        tuned = method.grid or method.epochs
        assert method.num_tries == (grid.tries if tuned else 1)
