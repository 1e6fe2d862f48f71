"""The filter's file: written, read back, and refused where it does not belong."""

import json
from dataclasses import replace

import huggingface_hub.constants
import pytest

from dsg.errors import UserError
from dsg.evaluation.benchmarks.multiple_choice.permutations import VARIANTS
from dsg.evaluation.benchmarks.multiple_choice.question_filter import (
    FilteredModel,
    QuestionFilter,
    filter_content,
    weights_sample,
    write_filter,
)
from dsg.lm import load_config
from tests.choice_data import choice_rows, save_choice_model
from tests.hub_folders import write_cache

OLD, NEW = "a" * 40, "b" * 40
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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache with two commits of one model; the hub cannot be asked itself."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "model"
    save_choice_model(folder)
    for commit, revisions in ((OLD, ["v1"]), (NEW, ["v2", "main"])):
        write_cache(tmp_path / "cache", "org/name", commit, folder, revisions)
    return tmp_path / "cache"


@pytest.mark.usefixtures("cache")
def test_models_of_the_hub_are_told_apart_by_their_revision():
    def of(name):
        return FilteredModel.of(name, load_config(name))

    old, new = of("org/name@v1"), of("org/name")
    assert (old.name, old.revision, old.weights) == ("org/name", OLD, None)
    assert (new.name, new.revision) == ("org/name", NEW)
    assert old == of(f"org/name@{OLD}")
    assert new == of("org/name@main") == of("org/name@v2")
    assert old.difference(new) == f"revision is {OLD!r} there and {NEW!r} here"


def test_a_filter_of_another_revision_is_refused(cache, tmp_path):
    made = FilteredModel.of("org/name@v1", load_config("org/name@v1"))
    correct = dict.fromkeys(range(VARIANTS * 5), True)
    path = write_filter(tmp_path / "filter.json", filter_content(made, "lm_eval", SETS, correct))
    known = QuestionFilter(path, "correct")
    known.check_model(made)
    with pytest.raises(UserError, match=f"revision is '{OLD}' there and '{NEW}' here"):
        known.check_model(FilteredModel.of("org/name", load_config("org/name")))
    # A copy in a folder is known by its weights, and by its commit where it lies in the cache.
    place = str(cache / "models--org--name" / "snapshots" / NEW)
    assert FilteredModel.of(place, load_config(place)).revision == NEW


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
