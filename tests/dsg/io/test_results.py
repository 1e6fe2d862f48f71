import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsg.errors import UserError
from dsg.io.results import (
    KEYS,
    read_results,
    read_run_facts,
    row,
    write_results,
    write_run_facts,
)


def test_row_has_every_key_in_order_and_none_by_default():
    made = row(method="dsg", value=0.5)
    assert tuple(made) == KEYS
    assert {key for key, value in made.items() if value is not None} == {"method", "value"}


def test_row_refuses_an_unknown_key():
    with pytest.raises(UserError, match=r"unknown key\(s\) colour"):
        row(colour="red")


@pytest.mark.parametrize(("key", "value"), [("value", "0.5"), ("n", "3"), ("method", ["dsg"])])
def test_row_refuses_what_json_could_not_compare(key, value):
    with pytest.raises(UserError, match=f"`{key}`"):
        row(**{key: value})


def test_values_are_rounded_to_six_significant_digits():
    made = row(value=1 / 3, low=123456.789, high=1.23456789e-9)
    assert (made["value"], made["low"], made["high"]) == (0.333333, 123457.0, 1.23457e-9)


def test_numbers_of_other_libraries_become_plain():
    made = row(value=torch.tensor(0.25), n=np.int64(7), epoch=3.0, seed=torch.tensor(2))
    assert json.dumps([made["value"], made["n"], made["epoch"], made["seed"]]) == "[0.25, 7, 3, 2]"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null(value):
    assert row(value=value)["value"] is None


def test_negative_zero_is_zero():
    assert math.copysign(1.0, row(value=-0.0)["value"]) == 1.0


MEASUREMENTS = st.lists(
    st.builds(
        row,
        method=st.sampled_from([None, "base", "dsg"]),
        epoch=st.sampled_from([None, 0, 1, 10, 2]),
        request=st.sampled_from([None, 1, "pathogen"]),
        metric=st.just("accuracy"),
        value=st.floats(0, 1),
    ),
    unique_by=lambda fields: (fields["method"], fields["epoch"], fields["request"]),
    max_size=8,
)


@given(rows=MEASUREMENTS, data=st.data())
def test_the_file_does_not_depend_on_the_order_of_the_rows(tmp_path_factory, rows, data):
    folder = tmp_path_factory.mktemp("run")
    first = write_results(folder, rows).read_bytes()
    again = write_results(folder, data.draw(st.permutations(rows))).read_bytes()
    assert first == again
    assert sorted(map(str, read_results(folder))) == sorted(map(str, rows))


def test_rows_are_sorted_with_none_first_and_numbers_as_numbers(tmp_path):
    epochs = [10, 2, None, 0]
    write_results(tmp_path, [row(epoch=epoch, value=0.0) for epoch in epochs])
    assert [fields["epoch"] for fields in read_results(tmp_path)] == [None, 0, 2, 10]


def test_an_equal_row_is_written_once_and_a_contradiction_is_an_error(tmp_path):
    write_results(tmp_path, [row(method="dsg", value=0.5), row(method="dsg", value=0.5)])
    assert len(read_results(tmp_path)) == 1
    with pytest.raises(UserError, match=r"measure the same thing.*0\.5 and 0\.6"):
        write_results(tmp_path, [row(method="dsg", value=0.5), row(method="dsg", value=0.6)])


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    before = write_results(tmp_path, [row(method="dsg", value=0.5)]).read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_results(tmp_path, [row(method="dsg", value=0.7)])
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
    assert (tmp_path / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"method": "dsg"}', r"line 2 must be .* missing \['attack'"),
        (json.dumps({**row(), "colour": 1}), r"line 2 must be .* unknown \['colour'\]"),
        ("[1]", "line 2 must be"),
        (json.dumps({**row(), "value": "high"}), "line 2: Result key `value`"),
    ],
)
def test_reading_names_the_bad_line(tmp_path, line, message):
    good = json.dumps(row(method="dsg"))
    (tmp_path / "results.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=message):
        read_results(tmp_path)


def test_reading_a_folder_without_results_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"holds no results\.jsonl"):
        read_results(tmp_path)


def test_run_facts_hold_versions_and_host_but_no_secret(tmp_path):
    facts = {
        "configuration": {
            "hf_token": "s3cret-a",
            "WANDB_API_KEY": "s3cret-b",
            "logger": [{"password": "s3cret-c", "project": "dsg"}],
            "num_tokens": 12,
            "gate": "token",
        },
        "command": "dsg test --hf_token=s3cret-d --seed 1",
        "note": "hf_abcdefghijklmnopqrstuvwx",
        "clientSecret": "s3cret-e",
        "dtype": torch.float32,
        "path": tmp_path / "x",
    }
    text = write_run_facts(tmp_path, facts).read_text()
    assert "s3cret" not in text
    assert "abcdefghijkl" not in text
    read = read_run_facts(tmp_path)
    assert read["configuration"] == {
        "logger": [{"project": "dsg"}],
        "num_tokens": 12,
        "gate": "token",
    }
    assert read["command"] == "dsg test --hf_token=[removed] --seed 1"
    assert read["dtype"] == "torch.float32"
    assert read["versions"]["torch"] == torch.__version__
    assert read["host"]["num_cpus"] == os.cpu_count()


def test_run_facts_are_optional_but_must_be_an_object(tmp_path):
    assert read_run_facts(tmp_path) == {}
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        read_run_facts(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_run_facts(tmp_path)
