"""The filter's file: written, read back, and refused where it does not belong."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dsg.choices.permutations import VARIANTS
from dsg.choices.question_filter import (
    FilteredModel,
    QuestionFilter,
    filter_content,
    load_config,
    weights_sample,
    write_filter,
)
from dsg.errors import UserError
from tests.choice_data import choice_rows, save_choice_model

MODEL = FilteredModel("google/gemma-2-2b-it", "abc", None, "gemma2", 26, 2304, 256000)
SETS = {"one": choice_rows(3, subject="one"), "two": choice_rows(2, seed=1, subject="two")}


@pytest.fixture
def path(tmp_path):
    outcomes = {id: True for id in range(5 * VARIANTS)}
    outcomes[1 * VARIANTS] = False
    outcomes |= {4 * VARIANTS + number: False for number in range(24, 48)}
    return write_filter(tmp_path / "questions.json", filter_content(MODEL, "dsg", SETS, outcomes))


def test_what_is_kept_of_each_set(path):
    for given in (path, path.parent):
        known = QuestionFilter(given, "correct")
        assert known.kept("one", SETS["one"]) == [SETS["one"][0], SETS["one"][2]]
        assert known.kept("two", SETS["two"]) == SETS["two"]
    assert QuestionFilter(path, "correct_iff_question").kept("one", SETS["one"]) == []
    assert QuestionFilter(path, "correct_iff_question").kept("two", SETS["two"]) == SETS["two"][1:]
    assert known.facts["protocol"] == "dsg"
    assert known.facts["name"] == MODEL.name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "google/gemma-2-2b"}, "name is 'google/gemma-2-2b-it' there and"),
        ({"revision": "def"}, "revision is 'abc' there and 'def' here"),
        ({"hidden_size": 1}, "hidden_size is 2304 there and 1 here"),
    ],
)
def test_a_foreign_model_is_refused(path, change, reason):
    with pytest.raises(UserError, match=reason):
        QuestionFilter(path, "correct").check_model(replace(MODEL, **change))


def test_the_same_model_is_accepted(path):
    QuestionFilter(path, "correct").check_model(MODEL)
    QuestionFilter(path, "correct").check_model(replace(MODEL, revision=None))


def test_folders_are_told_apart_by_their_weights(tmp_path):
    names = [
        save_choice_model(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    here, moved, other = (FilteredModel.of(name, load_config(name)) for name in names)
    assert here.name == "a"
    assert here.difference(moved) is None
    assert "weights is" in (here.difference(other) or "")
    assert weights_sample(tmp_path) is None


def test_a_hub_model_is_named_without_its_revision():
    config = SimpleNamespace(
        model_type="llama",
        _commit_hash="123",
        get_text_config=lambda: SimpleNamespace(num_hidden_layers=1, hidden_size=2, vocab_size=3),
    )
    assert FilteredModel.of("org/name@v1", config) == FilteredModel(
        "org/name", "123", None, "llama", 1, 2, 3
    )


def test_other_questions_or_sets_are_refused(path):
    known = QuestionFilter(path, "correct")
    with pytest.raises(UserError, match="must hold the set 'three', got one of one, two"):
        known.kept("three", SETS["one"])
    with pytest.raises(UserError, match="a filter of 3 questions whose hash is"):
        known.kept("one", SETS["one"][:2])


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file or directory"):
        QuestionFilter(tmp_path / "nothing.json", "correct")
    for content in ("{}", "no JSON", json.dumps({"sets": {}, "model": {"a": 1}})):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(UserError, match=r"which is another file|is not JSON"):
            QuestionFilter(tmp_path / "other.json", "correct")


def test_a_model_without_configuration_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"with a config.json, got"):
        load_config(str(tmp_path))
