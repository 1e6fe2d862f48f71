"""Questions from files and from folders in the hub's layout; malformed ones are refused."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from datamodules.multiple_choice.rows import parse_rows, read_sets
from dsg.errors import UserError
from dsg.evaluation.benchmarks.multiple_choice.subjects import MMLU_SUBJECTS
from tests.choice_data import choice_rows, write_rows

GOOD = {"question": "w1?", "choices": ["w1", "w2", "w3", "w4"], "answer": 2}


def write_folder(folder, configs):
    """A data set in the hub's layout: a card that lists configurations, and Parquet files."""
    lines = ["---", "configs:"]
    for config, rows in configs.items():
        (folder / config).mkdir(parents=True)
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / config / "test-00000-of-00001.parquet")
        lines += [f"- config_name: {config}", "  data_files:", "  - split: test"]
        lines += [f"    path: {config}/test-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return str(folder)


def records(rows, **extra):
    return [
        {"question": r.question, "choices": list(r.choices), "answer": r.answer, **extra}
        for r in rows
    ]


def test_files_of_all_kinds_hold_the_same_questions(tmp_path):
    rows = choice_rows(3, subject="own")
    paths = {name: tmp_path / name / f"own{name}" for name in (".jsonl", ".json", ".parquet")}
    for path in paths.values():
        path.parent.mkdir()
    write_rows(paths[".jsonl"], rows)
    paths[".json"].write_text(json.dumps(records(rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records(rows)), paths[".parquet"])
    for number, columns in enumerate((["choices"], list("ABCD"))):
        paths[f"csv{number}"] = tmp_path / str(number) / "own.csv"
        paths[f"csv{number}"].parent.mkdir()
        with paths[f"csv{number}"].open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["question", *columns, "answer"])
            for r in rows:
                choices = [json.dumps(r.choices)] if columns == ["choices"] else r.choices
                writer.writerow([r.question, *choices, "ABCD"[r.answer] if number else r.answer])
    for path in paths.values():
        assert read_sets([str(path)]) == {"own": rows}


def test_hub_layout(tmp_path):
    bio, aging = choice_rows(2, subject="wmdp-bio"), choice_rows(3, seed=1, subject="human_aging")
    wmdp = write_folder(tmp_path / "wmdp", {"wmdp-bio": records(bio)})
    mmlu = write_folder(tmp_path / "mmlu", {"human_aging": records(aging, subject="human_aging")})
    found = read_sets(["wmdp-bio", "human_aging"], wmdp, mmlu)
    assert found == {"wmdp-bio": bio, "human_aging": aging}
    with pytest.raises(UserError, match="wmdp-cyber"):
        read_sets(["wmdp-cyber"], wmdp, mmlu)


def test_all_of_mmlu_is_read_at_once(tmp_path):
    rows = {name: choice_rows(1, seed, name) for seed, name in enumerate(MMLU_SUBJECTS)}
    everything = [record for name, part in rows.items() for record in records(part, subject=name)]
    mmlu = write_folder(tmp_path / "mmlu", {"all": everything})
    assert read_sets(MMLU_SUBJECTS, mmlu=mmlu) == rows
    mmlu = write_folder(tmp_path / "less", {"all": everything[1:]})
    with pytest.raises(UserError, match="1 are missing, such as 'abstract_algebra'"):
        read_sets(MMLU_SUBJECTS, mmlu=mmlu)


def test_subjects_of_a_file_are_sets(tmp_path):
    path = tmp_path / "own.jsonl"
    lines = [{**GOOD, "subject": "one"}, {**GOOD, "subject": "two"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = read_sets([str(path)])
    [first], [other] = found["one"], found["two"]
    assert first.key == other.key
    with pytest.raises(UserError, match="got 'one' again"):
        read_sets([str(path), str(path)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["w1", "w2", "w3"]}, "must have four `choices` .*, got 3"),
        ({"choices": ["w1"] * 5}, "must have four `choices` .*, got 5"),
        ({"choices": None}, "must have four `choices` .*, got None"),
        ({"choices": "w1, w2"}, "must have a JSON list in `choices`"),
        ({"choices": '{"A": "w1"}'}, "must have four `choices`"),
        ({"choices": ["w1", "w2", "w3", " "]}, "must have a text in each choice, got ' '"),
        ({"choices": ["w1", "w2", "w3", None]}, "must have a text in each choice, got None"),
        ({"answer": 4}, "must have an `answer` from 0 to 3 .*, got 4"),
        ({"answer": -1}, "must have an `answer`"),
        ({"answer": "E"}, "must have an `answer`"),
        ({"answer": True}, "must have an `answer`"),
        ({"answer": None}, "must have an `answer`"),
        ({"answer": 1.0}, "must have an `answer`"),
        ({"question": "\n"}, r"must have a text in `question`"),
        ({"question": None}, r"must have a text in `question`, got None"),
    ],
)
def test_malformed_questions_are_refused(change, message):
    with pytest.raises(UserError, match=f"question 2 of 'set' {message}"):
        parse_rows([GOOD, {**GOOD, **change}], "set")


def test_no_questions_are_refused():
    with pytest.raises(UserError, match="'set' must hold at least one question"):
        parse_rows([], "set")
