"""A journal on disk: several attempts and ranks, torn lines, changed settings."""

import pytest

from dsg.errors import UserError
from dsg.io.journal import Journal


def started(folder, rank=0, **settings):
    outcomes = Journal(folder / "outcomes", rank)
    outcomes.open(settings)
    outcomes.begin(settings)
    return outcomes


def test_what_ranks_and_attempts_append_is_read_together(tmp_path):
    first, second = started(tmp_path), Journal(tmp_path / "outcomes", 1)
    second.open({})
    assert first.known == second.known == {}
    first.append([0, 1], [True, False])
    second.append([2], [True])
    resumed = started(tmp_path)
    assert resumed.known == {0: True, 1: False, 2: True}
    resumed.append([3], [False])
    assert resumed.read() == {0: True, 1: False, 2: True, 3: False}
    names = sorted(path.name for path in (tmp_path / "outcomes").glob("*.jsonl"))
    assert names == ["1-0.jsonl", "1-1.jsonl", "2-0.jsonl"]


def test_a_line_that_was_cut_short_is_as_if_never_written(tmp_path):
    started(tmp_path).append([0], [True])
    path = tmp_path / "outcomes" / "1-0.jsonl"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole + whole[:length])
        assert started(tmp_path).known == {0: True}
        path.write_bytes(whole[:length])
        assert started(tmp_path).known == {}


def test_the_tenth_attempt_comes_after_the_ninth(tmp_path):
    for number in range(11):
        started(tmp_path).append([0], [number == 0])
    assert started(tmp_path).known == {0: True}
    assert (tmp_path / "outcomes" / "11-0.jsonl").is_file()


def test_other_settings_are_refused(tmp_path):
    started(tmp_path, protocol="dsg", model="one")
    with pytest.raises(UserError, match="but model changed since; restore it or use --overwrite"):
        started(tmp_path, protocol="dsg", model="other")
