import json

import pytest

from datamodules.mt_bench import MtBenchData
from datamodules.parts.corpora import Corpus, CorpusSettings
from dsg.errors import UserError
from tests.conversations import rows, save_chat_model, write_questions
from tests.hub_folders import write_dataset


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_chat_model(tmp_path_factory.mktemp("model")))


def made(model, questions, **settings):
    data = MtBenchData(model, str(questions), **settings)
    data.setup("test")
    return data


def test_the_published_file_and_the_hubs_copy_are_the_same(tmp_path, model):
    file = write_questions(tmp_path / "question.jsonl")
    hub = [
        {
            "prompt": row["turns"],
            "prompt_id": row["question_id"],
            "category": row["category"],
            "reference": row.get("reference", []),
        }
        for row in rows()
    ]
    folder = write_dataset(tmp_path / "mt_bench_prompts", {"default": {"train": hub}})
    published, copied = made(model, file), made(model, folder)
    assert published.conversations() == copied.conversations()
    assert published.conversations()[2].references == ("w5", "w6")
    facts = published.facts()
    assert (facts["n"], facts["questions"], facts["revision"]) == (7, "question.jsonl", None)
    assert facts["sha256"] == copied.facts()["sha256"]
    assert str(tmp_path) not in json.dumps(facts)


def test_every_conversation_comes_once(tmp_path, model):
    data = made(model, write_questions(tmp_path / "question.jsonl"), batch_size=3)
    batches = list(data.test_dataloader())
    assert [len(batch.conversations) for batch in batches] == [3, 3, 1]
    ids = [conversation.id for batch in batches for conversation in batch.conversations]
    assert sorted(ids) == list(range(7))


def test_reference_answers(tmp_path, model):
    path = tmp_path / "gpt-4.jsonl"
    line = {"question_id": 100, "choices": [{"index": 0, "turns": ["w7", "w8"]}]}
    path.write_text(json.dumps(line) + "\n")
    questions = write_questions(tmp_path / "question.jsonl")
    data = made(model, questions, reference_answers=str(path))
    assert data.conversations()[0].references == ("w7", "w8")
    assert data.conversations()[2].references == ("w5", "w6")


def test_guard_texts_come_from_the_corpora(tmp_path, model):
    questions = write_questions(tmp_path / "question.jsonl")
    with pytest.raises(UserError, match="`corpora` must name the texts"):
        made(model, questions).forget_texts()
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"w{i} w1"}) + "\n" for i in range(20)))
    forget = tmp_path / "forget.jsonl"
    forget.write_text(json.dumps({"text": "w9 w9"}) + "\n")
    settings = CorpusSettings(retain=[Corpus(str(texts))], forget=[Corpus(str(forget))])
    data = made(model, questions, corpora=settings)
    assert data.forget_texts() == ["w9 w9"]
    kinds = [data.retain_texts(), data.calibration_texts(near=False), data.heldout_texts()]
    assert sum(map(len, kinds)) == 20


def test_a_file_without_questions(tmp_path, model):
    path = tmp_path / "question.jsonl"
    path.write_text(json.dumps({"text": "no"}) + "\n")
    with pytest.raises(UserError, match="row 0 of `questions` must have `turns`"):
        made(model, path)
