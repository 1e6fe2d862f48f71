"""Configurations of cells, their names, and when a cell counts as finished."""

import json

import pytest

from dsg.cli.configs import (
    benchmark_seeds,
    changed,
    combinations,
    label,
    read_config,
    value_at,
    with_seed,
)
from dsg.cli.grid.cells import Cell
from dsg.errors import UserError

CONFIG = {
    "model": {
        "class_path": "M",
        "init_args": {"seed": 0, "model_name": "tiny_world:0/model", "lr": 0.1},
    },
    "data": {"init_args": {"seed": None, "control_seed": 3, "names": ["tiny_world:0/sae", "x"]}},
}


def test_changed_sets_dotted_keys_in_a_copy():
    found = changed(CONFIG, {"model.init_args.lr": 0.5, "trainer.max_epochs": 2})
    assert found["model"]["init_args"]["lr"] == 0.5
    assert found["trainer"] == {"max_epochs": 2}
    assert "trainer" not in CONFIG
    assert CONFIG["model"]["init_args"]["lr"] == 0.1


def test_a_key_must_lead_through_mappings():
    with pytest.raises(UserError, match=r"must lead through mappings, got 'M' at 'class_path'"):
        changed(CONFIG, {"model.class_path.lr": 1})


def test_with_seed_reaches_every_seed_and_benchmark():
    found = with_seed(CONFIG, 7)
    assert found["seed_everything"] == 7
    assert found["model"]["init_args"]["seed"] == 7
    assert found["model"]["init_args"]["model_name"] == "tiny_world:7/model"
    assert found["data"]["init_args"] == {
        "seed": 7,
        "control_seed": 3,
        "names": ["tiny_world:7/sae", "x"],
    }
    assert benchmark_seeds(found) == {7}
    assert benchmark_seeds({"name": "other:7/model"}) == set()


def test_value_at():
    assert value_at(CONFIG, "model.init_args.lr") == 0.1
    assert value_at(CONFIG, "model.init_args.none.deeper") is None
    assert value_at(CONFIG, "model.class_path.lr") is None


def test_combinations_vary_the_last_name_fastest():
    found = combinations({"a": [1, 2], "b": [3, 4]})
    assert found == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]
    assert combinations({}) == [{}]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model.init_args.lr": 1e-5, "data.n": 20}, "lr=1e-05,n=20"),
        ({"forget.lr": 0.1, "retain.lr": 0.2}, "forget.lr=0.1,retain.lr=0.2"),
        ({"a.target": "mlp./x y"}, "target=mlp._x_y"),
        ({}, "default"),
    ],
)
def test_label(values, expected):
    assert label(values) == expected


def test_read_config_names_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="must hold a mapping"):
        read_config(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="is not YAML"):
        read_config(tmp_path / "bad.yaml")


def test_only_the_very_same_cell_is_finished(tmp_path):
    cell = Cell("a/b", "fit", CONFIG, ["d1"])
    assert not cell.is_finished(tmp_path)
    cell.finish(tmp_path, 1.234, {"found": [1]})
    assert cell.is_finished(tmp_path)
    assert (cell.seconds(tmp_path), cell.outcome(tmp_path)) == (1.23, {"found": [1]})
    assert Cell("a/b", "fit", CONFIG, ["d2"]).outcome(tmp_path) is None
    assert not Cell("a/b", "test", CONFIG, ["d1"]).is_finished(tmp_path)
    assert not Cell("a/b", "fit", changed(CONFIG, {"x": 1}), ["d1"]).is_finished(tmp_path)
    assert not Cell("a/b", "fit", CONFIG, ["d2"]).is_finished(tmp_path)
    assert not Cell("a/c", "fit", CONFIG, ["d1"]).is_finished(tmp_path)


def test_a_spoilt_mark_counts_as_unfinished(tmp_path):
    cell = Cell("a", "fit", CONFIG)
    cell.finish(tmp_path, 1.0)
    mark = cell.folder(tmp_path) / "cell.json"
    assert json.loads(mark.read_text())["digest"] == cell.digest
    mark.write_text('{"digest": ')
    assert not cell.is_finished(tmp_path)
