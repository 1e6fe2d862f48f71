import json

import pytest

from dsg.cli.main import main
from tests.dsg.evaluation.test_compare import question, two_runs, write


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def test_the_table(tmp_path, capsys):
    first, second = two_runs(tmp_path)
    assert main(["compare", str(first), str(second)]) == 0
    said = capsys.readouterr().out
    assert "guard on: 12 items in both, 1 only in A, 0 only in B" in said
    [correct] = [line for line in said.splitlines() if " correct " in line]
    assert "guard on, questions" in said
    cells = correct.split()
    assert cells[:5] == ["forget", "correct", "0.600", "0.200", "-0.400"]
    assert cells[5].startswith("[-0.")
    assert cells[-2:] == ["0.125", "10"]


def test_long_names_are_folded_and_numbers_are_not(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    domain = "high_school_european_history"
    runs = [
        write(tmp_path / name, [question(f"q{i}", i < right, domain=domain) for i in range(10)])
        for name, right in (("a", 6), ("b", 2))
    ]
    assert main(["compare", *map(str, runs)]) == 0
    said = capsys.readouterr().out
    assert "-0.400 [-0." in said
    assert "0.125  10" in said
    assert max(map(len, said.splitlines())) <= 80


def test_states_and_choices_and_json(tmp_path, capsys):
    rows = [question(f"q{i}", 1, "off") for i in range(4)]
    rows += [question(f"q{i}", 0, "on") for i in range(4)]
    run, file = str(write(tmp_path, rows)), tmp_path / "found.json"
    options = ["--guard_a", "off", "--guard_b", "on", "--metric", "correct", "--json", str(file)]
    assert main(["compare", run, run, *options]) == 0
    assert "off -> on" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert [c["metric"] for c in found["comparisons"]] == ["correct"]
    assert found["comparisons"][0]["test"]["difference"] == -1.0
    assert found["items"][0]["both"] == 4


def test_every_option_is_explained_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("(default:") == 5


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--guard_a", "on"], "given together"),
        (["--json", "nowhere/found.json"], "existing folder"),
        (["--metric", "accuracy"], "--metric must be one of"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, options, complaint):
    first, second = two_runs(tmp_path)
    assert main(["compare", str(first), str(second), *options]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
