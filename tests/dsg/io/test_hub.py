"""Names, data sets and refusals of the hub: from folders, files and a local stand-in server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dsg.errors import UserError
from dsg.io.hub import (
    dataset_revision,
    hub_error,
    load_rows,
    looks_local,
    parse_name,
    short_name,
)
from tests.hub_folders import wmdp_rows, write_dataset, write_gemma_scope, write_wmdp
from tests.hub_server import SHA, serve

TOKEN = "hf_not_to_be_printed"
ROWS = [{"question": "a\u2028b?", "answer": 1}, {"question": "c?", "answer": 0}]
# Prints what each name gives, one line of JSON each.
READ = """
import json, sys
from dsg.errors import UserError
from dsg.io.hub import dataset_revision, load_rows
from dsg.sae.loading import load_sae

def read(kind, name):
    if kind == "sae":
        return load_sae(name, "layer_3/width_16k/average_l0_142").cfg.d_sae
    return [load_rows(name, "wmdp-bio", "test"), dataset_revision(name, "wmdp-bio")]

for argument in sys.argv[1:]:
    try:
        print(json.dumps(read(*argument.split("=", 1))))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def read_elsewhere(home: Path, *names: str, **environment: str) -> tuple[list, str]:
    """Read in a process of its own: the libraries look at their environment only once."""
    done = subprocess.run(
        [sys.executable, "-c", READ, *names],
        env={**os.environ, "HF_HOME": str(home), "HF_TOKEN": TOKEN, **environment},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cais/wmdp", ("cais/wmdp", None)),
        ("cais/wmdp@main", ("cais/wmdp", "main")),
        ("gemma-scope-2b-pt-res@" + SHA, ("gemma-scope-2b-pt-res", SHA)),
    ],
)
def test_names_with_and_without_revision(name, expected):
    assert parse_name(name) == expected


@pytest.mark.parametrize("name", ["@main", "cais/wmdp@"])
def test_half_a_name_is_refused(name):
    with pytest.raises(UserError, match=r"must read org/name@revision, got"):
        parse_name(name)


def test_a_folder_may_have_an_at_in_its_name(tmp_path):
    folder = tmp_path / "me@home"
    folder.mkdir()
    assert parse_name(str(folder)) == (str(folder), None)
    assert short_name(str(folder)) == "me@home"
    assert short_name("org/name@v1") == "org/name"


def test_what_can_only_be_a_path(tmp_path):
    assert all(looks_local(name) for name in (str(tmp_path), "./x", "a/b/c"))
    assert not any(looks_local(name) for name in ("cais/wmdp", "gpt2"))


def test_a_folder_in_the_hubs_layout(tmp_path):
    folder = str(write_wmdp(tmp_path / "wmdp", num=7))
    for config in ("wmdp-bio", "wmdp-chem", "wmdp-cyber"):
        assert load_rows(folder, config, "test") == wmdp_rows(config, 7)
    assert load_rows(folder, "wmdp-bio", "test[2:4]") == wmdp_rows("wmdp-bio", 7)[2:4]
    assert dataset_revision(folder, "wmdp-bio") is None


def test_a_single_configuration_needs_no_name(tmp_path):
    folder = write_dataset(tmp_path / "one", {"default": {"train": ROWS}})
    assert load_rows(str(folder), None, "train") == ROWS


def test_unknown_configurations_and_splits_list_what_there_is(tmp_path):
    folder = str(write_wmdp(tmp_path / "wmdp"))
    known = r"must be one of \['wmdp-bio', 'wmdp-chem', 'wmdp-cyber'\]"
    with pytest.raises(UserError, match=rf"`config` of .* {known}, got 'wmdp-biology'; choose"):
        load_rows(folder, "wmdp-biology", "test")
    with pytest.raises(UserError, match=rf"`config` of .* {known}, got None; choose one"):
        load_rows(folder, None, "test")
    with pytest.raises(UserError, match=r"`split` of .* must be one of \['test'\], got 'train'"):
        load_rows(folder, "wmdp-bio", "train")


def test_a_folder_that_is_no_data_set(tmp_path):
    with pytest.raises(UserError, match="must be a data set in the hub's layout"):
        load_rows(str(tmp_path), None, "test")
    with pytest.raises(UserError, match="must be a hub name, a folder in the hub's layout, or"):
        load_rows(str(tmp_path / "missing"), None, "test")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_files_give_their_rows(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        # Parsed as JSON: the line separator U+2028 inside a string ends no line.
        lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
        path.write_text("\ufeff" + "\n\n".join(lines) + "\n", encoding="utf-8")
    assert load_rows(str(path), "ignored", "ignored") == ROWS
    assert dataset_revision(str(path), None) is None


def test_csv_gives_strings(tmp_path):
    (tmp_path / "rows.csv").write_text('question,answer\n"a, or\nb?",1\n')
    rows = load_rows(str(tmp_path / "rows.csv"), None, "test")
    assert rows == [{"question": "a, or\nb?", "answer": "1"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n\n{"a": \n', r"x.jsonl, line 3 is not JSON"),
        ("x.jsonl", b'{"a": 1}\n[2]\n', r"x.jsonl, line 2, must be a JSON object, got list"),
        ("x.json", b'[{"a": 1},\n {"b" 2}]', r"x.json, line 2 is not JSON"),
        ("x.json", b'{"a": 1}', r"must hold a list of JSON objects, got dict"),
        ("x.json", b'[{"a": 1}, 2]', r"x.json, entry 2, must be a JSON object, got int"),
        ("x.jsonl", b"\n", r"must hold at least one row, got none"),
        ("x.csv", b"a,b\n", r"must hold at least one row, got none"),
        ("x.csv", b"a\n\xff\n", r"is not text in UTF-8 \(byte 2 is the first"),
        ("x.parquet", b"no", r"must be Parquet, got none"),
        ("x.txt", b"no", r"must be one of .jsonl, .json, .csv, .parquet; convert it"),
    ],
)
def test_broken_files_name_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_rows(str(tmp_path / name), None, "test")


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"gone.jsonl' cannot be read \(no such file or directory"):
        load_rows(str(tmp_path / "gone.jsonl"), None, "test")


def test_a_server_is_read_at_a_revision_and_refuses_in_one_sentence(tmp_path):
    rows = wmdp_rows("wmdp-bio", 7)
    folders = {
        "datasets/org/wmdp": write_wmdp(tmp_path / "wmdp", num=7),
        "models/google/gemma-scope-2b-pt-res": tmp_path / "scope",
    }
    write_gemma_scope(tmp_path / "scope/layer_3/width_16k/average_l0_142")
    with serve(folders) as (address, tokens):
        found, said = read_elsewhere(
            tmp_path,
            "rows=org/wmdp@v1",
            "sae=gemma-scope-2b-pt-res@v1",
            "rows=org/wmdp@v2",
            "rows=org/gated",
            "rows=org/missing",
            "sae=gemma-scope-2b-pt-res@v2",
            "sae=org/gated",
            HF_ENDPOINT=address,
        )
    assert found[:2] == [[rows, SHA], 16_384]
    for message, repository, reason in (
        (found[2], "datasets/org/wmdp", "it has no revision 'v2'"),
        (found[3], "datasets/org/gated", "it is gated"),
        (found[4], "datasets/org/missing", "there is none of that name, or it is private"),
        (found[5], "google/gemma-scope-2b-pt-res", "it has no revision 'v2'"),
        (found[6], "org/gated", "it is gated"),
    ):
        assert f"({reason}); check the name" in message
        assert f"https://huggingface.co/{repository} if it" in message
        assert "HF_TOKEN" in message
        assert message.count("\n") == 0
    # The token went where it belongs, and nowhere else.
    assert f"Bearer {TOKEN}" in tokens
    assert TOKEN not in said

    names = ["rows=org/wmdp@v1", f"rows=org/wmdp@{SHA}", "rows=org/wmdp@v2", "rows=org/gated"]
    again, _ = read_elsewhere(tmp_path, *names, HF_HUB_OFFLINE="1")
    assert again[:2] == [[rows, SHA], [rows, SHA]]
    # `datasets` alone would have taken the copy of v1 for v2.
    assert "(the copy in the cache is another revision)" in again[2]
    assert "(HF_HUB_OFFLINE is set and the cache has no such copy)" in again[3]


def test_other_refusals_are_told_in_their_first_line_without_the_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    error = hub_error("dataset", "data set", "org/name", OSError(f"bad token {TOKEN}\nmore"))
    assert "(bad token ...); check the name" in str(error)
    assert "more" not in str(error)
