"""Corpora: reading, filtering and dealing out the text of a guard."""

import json

import jsonargparse
import pytest

from datamodules.parts.corpora import Corpora, Corpus, CorpusSettings
from dsg.errors import UserError
from dsg.selection.splits import describe_texts, guard_texts
from tests.hub_folders import write_bio_forget, write_corpora, write_dataset, write_wikitext


def write_lines(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def settings(tmp_path):
    return CorpusSettings(
        forget=[Corpus(str(write_bio_forget(tmp_path / "bio", num=12)))],
        retain=[
            Corpus(
                str(write_wikitext(tmp_path / "wiki", num=60)),
                config="wikitext-2-raw-v1",
                split="test",
                min_chars=51,
            )
        ],
        near=[Corpus(str(write_corpora(tmp_path / "corpora")), config="bio-retain-corpus")],
    )


def test_texts_of_every_purpose_are_disjoint_and_complete(settings):
    corpora = Corpora(settings)
    texts = guard_texts(corpora, near=False)
    assert len(texts["forget_selection"]) + len(texts["forget_heldout"]) == 12
    retain = [text for name in texts if name.startswith("retain") for text in texts[name]]
    assert sorted(retain) == sorted(settings.retain[0].texts())
    assert len(set(retain)) == len(retain) == 60
    # 30 and 15 of 60 are expected, and 5 standard deviations are 19 and 17.
    assert 11 < len(texts["retain_selection"]) < 49
    assert min(len(texts["retain_calibration"]), len(texts["retain_heldout"])) > 0


def test_a_texts_part_does_not_depend_on_the_others(settings, tmp_path):
    whole = Corpora(settings)
    some = settings.retain[0].texts()[10:30]
    fewer = [Corpus(write_lines(tmp_path / "some.jsonl", some))]
    part = Corpora(CorpusSettings(retain=fewer))
    assert part.retain_texts() == [text for text in whole.retain_texts() if text in some]
    assert part.heldout_texts() == [text for text in whole.heldout_texts() if text in some]


def test_near_text_joins_the_calibration_alone(settings):
    corpora = Corpora(settings)
    near = settings.near[0].texts()
    assert corpora.calibration_texts(near=True) == corpora.calibration_texts(near=False) + near
    assert not set(near) & {*corpora.retain_texts(), *corpora.heldout_texts()}


def test_near_text_that_nobody_gave(tmp_path):
    retain = [Corpus(write_lines(tmp_path / "r.jsonl", ["one text", "another text"]))]
    with pytest.raises(UserError, match="`near` of the corpora must hold text"):
        Corpora(CorpusSettings(retain=retain)).calibration_texts(near=True)


def test_short_blank_and_long_texts(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", ["", "  \n ", "abc", "abcd", " abcdefgh"])
    assert Corpus(path).texts() == ["abc", "abcd", " abcdefgh"]
    assert Corpus(path, min_chars=4).texts() == ["abcd", " abcdefgh"]
    assert Corpus(path, min_chars=4, max_chars=5).texts() == ["abcd", " abcd"]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(1, [0]), (3, [0, 3, 6]), (9, list(range(9))), (10, list(range(10))), (99, list(range(10)))],
)
def test_a_limit_takes_texts_evenly(tmp_path, limit, expected):
    path = write_lines(tmp_path / "x.jsonl", [str(number) for number in range(10)])
    assert Corpus(path, limit=limit).texts() == [str(number) for number in expected]


def test_another_column(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", ["a"], column="abstract")
    assert Corpus(path, column="abstract").texts() == ["a"]
    with pytest.raises(UserError, match=r"must name a column of strings, got 'text', and the col"):
        Corpus(path).texts()


def test_a_broken_line_of_a_local_forget_corpus(tmp_path):
    (tmp_path / "bio.jsonl").write_text('{"text": "a"}\n{"text": b}\n')
    corpora = Corpora(CorpusSettings(retain=[], forget=[Corpus(str(tmp_path / "bio.jsonl"))]))
    with pytest.raises(UserError, match=r"bio.jsonl, line 2 is not JSON"):
        corpora.forget_texts()


def test_nothing_long_enough(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", ["a", "b"])
    with pytest.raises(UserError, match=r"a text of at least 50 characters, got none in 2 rows"):
        Corpus(path, min_chars=50).texts()
    with pytest.raises(UserError, match=r"`limit` of .* must be at least 1, got 0"):
        Corpus(path, limit=0).texts()


def test_text_of_both_kinds_is_refused(tmp_path):
    forget = Corpus(write_lines(tmp_path / "f.jsonl", ["The  Virus.", "Other"]))
    retain = Corpus(write_lines(tmp_path / "r.jsonl", ["the virus.", "A king"]))
    with pytest.raises(UserError, match="splits must not share a text, got 'the virus"):
        Corpora(CorpusSettings(retain=[retain], forget=[forget])).retain_texts()


def test_facts_tell_what_was_read_and_not_where_it_lies(settings, tmp_path):
    corpora = Corpora(settings)
    assert corpora.facts() == {}  # nothing has been read
    corpora.retain_texts()
    facts = corpora.facts()
    assert facts["forget"] == [
        {
            "source": "bio",
            "revision": None,
            "config": None,
            "split": "train",
            **describe_texts(settings.forget[0].texts()),
        }
    ]
    assert [entry["n"] for kind in facts.values() for entry in kind] == [12, 60, 16]
    assert str(tmp_path) not in json.dumps(facts)


def test_settings_are_parsed_from_yaml():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--corpora", type=CorpusSettings | None)
    text = "{retain: [{source: Salesforce/wikitext, config: wikitext-2-raw-v1, min_chars: 51}]}"
    found = parser.instantiate(parser.parse_args([f"--corpora={text}"])).corpora
    wikitext = Corpus("Salesforce/wikitext", config="wikitext-2-raw-v1", min_chars=51)
    assert found == CorpusSettings(retain=[wikitext])


def test_all_splits_of_a_hub_folder_can_be_joined(tmp_path):
    folder = write_dataset(
        tmp_path / "two", {"default": {"train": [{"text": "a"}], "test": [{"text": "b"}]}}
    )
    assert Corpus(str(folder), split="train+test").texts() == ["a", "b"]
