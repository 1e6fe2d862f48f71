"""The data module: halves, pools, facts, filters, contexts that are too short, what is refused."""

import json
from dataclasses import replace

import pytest

from datamodules.multiple_choice.data import MultipleChoiceData
from datamodules.parts.corpora import Corpus, CorpusSettings
from dsg.errors import UserError
from dsg.evaluation.benchmarks.multiple_choice.permutations import VARIANTS
from dsg.evaluation.benchmarks.multiple_choice.question_filter import (
    FilteredModel,
    filter_content,
    write_filter,
)
from dsg.evaluation.collate import encode_question
from dsg.lm import load_config
from tests.choice_data import choice_rows, save_choice_model, write_rows
from tests.datamodules.reading import read_by

BIO, GEOGRAPHY = choice_rows(20, subject="bio"), choice_rows(11, 1, subject="geography")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choices")
    save_choice_model(folder / "model")
    write_rows(folder / "bio.jsonl", BIO)
    write_rows(folder / "geography.jsonl", GEOGRAPHY)
    return folder


@pytest.fixture
def data(folder):
    def make(reads="evaluate", **changes):
        settings = {
            "model_name": str(folder / "model"),
            "forget": [str(folder / "bio.jsonl")],
            "retain": [str(folder / "geography.jsonl")],
            **changes,
        }
        made = read_by(MultipleChoiceData(**settings), reads)
        made.setup("test")
        return made

    return make


@pytest.mark.parametrize("protocol", ["lm_eval", "dsg", "cloze"])
def test_every_question_is_in_one_half(data, protocol):
    made = data(protocol=protocol)
    halves = [made.questions(split) for split in ("validation", "test")]
    assert all(8 < len(half) < 24 for half in halves)
    for half in halves:
        assert [question.id for question in half] == list(range(len(half)))
        assert {question.protocol for question in half} == {protocol}
    asked = {(q.domain, q.pool, q.key, q.answer) for half in halves for q in half}
    assert asked == {
        *(("bio", "forget", row.key, row.answer) for row in BIO),
        *(("geography", "retain", row.key, row.answer) for row in GEOGRAPHY),
    }
    assert made.name == "bio+geography"
    assert made.passages("test") == []


def test_a_half_depends_neither_on_protocol_nor_on_the_other_sets(data):
    alone = data(retain=[], protocol="cloze").questions("test")
    together = [q for q in data().questions("test") if q.domain == "bio"]
    assert [q.key for q in alone] == [q.key for q in together]


def test_a_question_that_stands_twice_in_a_file_is_asked_once(data, tmp_path, caplog):
    moved = replace(BIO[1], choices=BIO[1].choices[::-1], answer=3 - BIO[1].answer)
    spaced = replace(BIO[2], question=BIO[2].question.replace(" ", "  "))
    path = write_rows(tmp_path / "twice.jsonl", [*BIO, BIO[0], moved, spaced])
    made = data(forget=[path], retain=[])
    assert keys(made) == {row.key for row in BIO}
    assert made.facts()["sets"]["twice"]["n"] == len(BIO)
    assert "3 of the 23 questions of twice are left out: 0 for equal choices, 3 that" in caplog.text


def test_a_question_with_equal_choices_is_not_asked(data, tmp_path, caplog):
    first, second, third, _ = BIO[0].choices
    alike = replace(BIO[0], choices=(first, second, third, f" {second}"))
    path = write_rows(tmp_path / "alike.jsonl", [alike, *BIO[1:]])
    assert len(keys(data(forget=[path], retain=[]))) == len(BIO) - 1
    assert "1 of the 20 questions of alike are left out: 1 for equal choices, 0" in caplog.text
    path = write_rows(tmp_path / "all.jsonl", [alike])
    with pytest.raises(UserError, match="with four different choices, got none among 1; mend"):
        data(forget=[path], retain=[])


@pytest.mark.parametrize("reads", ["evaluate", "filter"])
def test_a_question_to_forget_and_to_retain_is_refused(data, tmp_path, reads):
    moved = replace(BIO[4], choices=BIO[4].choices[::-1], answer=3 - BIO[4].answer)
    path = write_rows(tmp_path / "both.jsonl", [BIO[3], *GEOGRAPHY, moved])
    with pytest.raises(UserError, match=r"share a question, got 2 in both, .*in 'bio' and 'both'"):
        data(retain=[path], reads=reads)


def test_a_question_of_two_sets_counts_once_in_their_pool(data, folder, tmp_path, caplog):
    """As 78 questions of MMLU that belong to two subjects."""
    path = write_rows(tmp_path / "more.jsonl", [*BIO[:3], *choice_rows(2, 9)])
    made = data(forget=[str(folder / "bio.jsonl"), path])
    questions = [*made.questions("validation"), *made.questions("test")]
    assert sum(q.domain == "more" for q in questions) == 5
    assert sum(q.pool == "forget" for q in questions) == len(BIO) + 2
    assert {q.key for q in questions if q.pool is None} == {row.key for row in BIO[:3]}
    assert "3 questions stand in two sets of their pool (more) and count once" in caplog.text


def test_batches_hold_each_question_of_their_half_once(data):
    made = data(batch_size=4, val_split="test")
    for [loader] in (made.val_dataloader(), made.test_dataloader()):
        ids = [id for batch in loader for id in batch.ids.tolist()]
        assert sorted(ids) == list(range(len(made.questions("test"))))


def test_facts_tell_what_was_asked(data):
    facts = json.loads(json.dumps(data(protocol="dsg").facts()))
    assert facts["sets"]["bio"]["n"] == 20
    assert facts["sets"]["geography"]["pool"] == "retain"
    assert facts["max_length"] == 128
    assert facts["truncated_prompts"] == 0
    tokenizer = data().tokenizer
    for letter in ("A", " A", "D", " D"):
        assert facts["letter_ids"][letter] == [tokenizer.convert_tokens_to_ids(letter)]
    other = data(protocol="lm_eval").facts()["sets"]["bio"]
    assert facts["sets"]["bio"]["sha256"] == other["sha256"]
    assert facts["sets"]["bio"]["prompts_sha256"] != other["prompts_sha256"]
    assert "letter_ids" not in data(protocol="cloze").facts()


def test_long_prompts_are_refused_or_cut_and_counted(data):
    lengths = {
        q.key: max(map(len, encode_question(data().tokenizer, q)[1]))
        for split in ("validation", "test")
        for q in data().questions(split)
    }
    limit = sorted(lengths.values())[-5]
    with pytest.raises(UserError, match=rf"must fit into {limit} tokens"):
        data(max_length=limit)
    made = data(max_length=limit, allow_truncation=True)
    num_long = sum(length > limit for length in lengths.values())
    assert 0 < num_long < 5
    assert made.facts()["truncated_prompts"] == num_long
    for q in made.questions("validation"):
        assert max(map(len, encode_question(made.tokenizer, q)[1])) <= limit


@pytest.fixture
def filter_file(folder, tmp_path):
    """A filter of the folder's model that keeps every third question."""
    model = FilteredModel.of(str(folder / "model"), load_config(str(folder / "model")))
    outcomes = {
        VARIANTS * place + number: place % 3 == 0 and number < 40
        for place in range(len(BIO) + len(GEOGRAPHY))
        for number in range(VARIANTS)
    }
    sets = {"bio": BIO, "geography": GEOGRAPHY}
    return str(write_filter(tmp_path / "kept.json", filter_content(model, "dsg", sets, outcomes)))


def keys(data):
    return {q.key for split in ("validation", "test") for q in data.questions(split)}


def test_only_the_questions_of_a_filter_are_asked(data, filter_file):
    rows = [*BIO, *GEOGRAPHY]
    made = data(keep=filter_file, protocol="cloze")
    assert keys(made) == {row.key for row in rows[::3]}
    assert made.facts()["filter"]["protocol"] == "dsg"
    assert made.facts()["sets"]["bio"]["n"] == 7
    assert keys(data(keep=filter_file, keep_rule="correct_iff_question")) == keys(made)


def test_a_foreign_models_filter_is_refused_unless_it_is_named(data, filter_file, folder, tmp_path):
    changed = save_choice_model(tmp_path / "changed", seed=1)
    with pytest.raises(UserError, match=r"`keep` must be a filter made with the model 'changed'"):
        data(model_name=changed, keep=filter_file)
    base = str(folder / "model")
    assert keys(data(model_name=changed, keep=filter_file, base_model_name=base))
    with pytest.raises(UserError, match=r"weights is"):
        data(keep=filter_file, base_model_name=changed)


def test_a_filter_of_other_questions_is_refused(data, filter_file, tmp_path):
    path = write_rows(tmp_path / "bio.jsonl", BIO[1:])
    with pytest.raises(UserError, match="made from the same questions of 'bio'"):
        data(forget=[path], keep=filter_file)


@pytest.mark.parametrize("protocol", ["lm_eval", "dsg"])
def test_the_filters_batches_hold_every_variant_once(data, protocol):
    made = data(reads="filter", protocol=protocol, batch_size=100)
    batches = list(made.val_dataloader())
    ids = [id for batch in batches for id in batch.ids.tolist()]
    assert sorted(ids) == list(range(VARIANTS * (len(BIO) + len(GEOGRAPHY))))


def test_a_selection_reads_the_corpora_alone(data, tmp_path):
    for name, first in (("forget", 0), ("retain", 10)):
        lines = [json.dumps({"text": f"w{first} w{i % 26} {name} {i}"}) for i in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    corpora = CorpusSettings(
        forget=[Corpus(str(tmp_path / "forget.jsonl"))],
        retain=[Corpus(str(tmp_path / "retain.jsonl"))],
    )
    made = data(reads="select", corpora=corpora, forget=["wmdp-bio"], retain=["all"])
    assert len(made.forget_texts()) == 30
    assert made.facts()["corpora"]["retain"][0]["n"] == 30
    parts = [made.retain_texts(), made.calibration_texts(near=False), made.heldout_texts()]
    assert sum(map(len, parts)) == 30
    with pytest.raises(UserError, match="`corpora` must name the texts"):
        data().forget_texts()


def test_what_the_constructor_refuses(data):
    with pytest.raises(UserError, match="must name a set of questions"):
        data(forget=[], retain=[])
    with pytest.raises(UserError, match="must not share a set, got human_aging"):
        data(forget=["human_aging"], retain=["utility_bio"])
    with pytest.raises(UserError, match=r"'lm_eval' or 'dsg' for a question filter"):
        data(reads="filter", protocol="cloze")


def test_set_names_that_would_hide_another_are_refused(data, tmp_path):
    path = write_rows(tmp_path / "bio.jsonl", BIO)
    with pytest.raises(UserError, match="got 'bio' in `retain` where that name is taken"):
        data(retain=[path])
    path = write_rows(tmp_path / "forget.jsonl", BIO)
    with pytest.raises(UserError, match="got 'forget' in `retain`"):
        data(forget=[], retain=[path])
