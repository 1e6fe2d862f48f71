"""Training text beside multiple-choice questions: pairs, the attacker's text, refusals."""

import pytest

from datamodules.multiple_choice.data import MultipleChoiceData
from datamodules.parts.corpora import Corpus, CorpusSettings
from dsg.errors import UserError
from dsg.selection.splits import texts_digest
from tests.choice_data import choice_rows, choice_tokenizer, save_choice_model, write_rows
from tests.datamodules.reading import read_by

BIO, GEOGRAPHY = choice_rows(12, subject="bio"), choice_rows(6, 1, subject="geography")
LENGTH = 8
BOS = 2
# Words 0 to 9 in forget text, the others in retain text; no two texts are alike.
FORGET = [f"w{i // 9} w{i % 9} " + "w9 " * (6 + i) for i in range(10)]
RETAIN = [f"w{10 + i // 9} w{11 + i % 9} w25" for i in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choices")
    save_choice_model(folder / "model")
    write_rows(folder / "bio.jsonl", BIO)
    write_rows(folder / "geography.jsonl", GEOGRAPHY)
    for name, texts in (("forget", FORGET), ("retain", RETAIN)):
        (folder / f"{name}.txt.jsonl").write_text(
            "".join(f'{{"text": "{text.strip()}"}}\n' for text in texts)
        )
    return folder


@pytest.fixture
def data(folder):
    def make(forget=("forget",), retain=("retain",), reads="evaluate", forget_sets=None, **changes):
        corpora = CorpusSettings(
            forget=[Corpus(str(folder / f"{name}.txt.jsonl")) for name in forget],
            retain=[Corpus(str(folder / f"{name}.txt.jsonl")) for name in retain],
        )
        settings = {
            "model_name": str(folder / "model"),
            "forget": [str(folder / "bio.jsonl")] if forget_sets is None else forget_sets,
            "retain": [str(folder / "geography.jsonl")],
            "corpora": corpora,
            "train_length": LENGTH,
            "train_batch_size": 4,
            **changes,
        }
        made = read_by(MultipleChoiceData(**settings), reads)
        made.setup("fit")
        return made

    return make


def words(batch):
    """Words of each row, and that it begins with the one bos token."""
    tokenizer = choice_tokenizer()
    found = []
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        first, *rest = ids[mask.bool()].tolist()
        assert first == BOS
        assert BOS not in rest
        found.append([str(tokenizer.decode([token])).strip() for token in rest])
    return found


def number(word):
    return int(word.removeprefix("w"))


def test_pairs_are_forget_rows_beside_retain_rows(data):
    made = data(reads="unlearn")
    batches = list(made.train_dataloader())
    assert [batch["id"] for batch in batches] == list(range(len(batches)))
    forget = [row for batch in batches for row in words(batch["forget"])]
    retain = [row for batch in batches for row in words(batch["retain"])]
    assert len(forget) == len(retain)
    assert [len(b["forget"].input_ids) for b in batches] == [4] * (len(batches) - 1) + [
        len(forget) - 4 * (len(batches) - 1)
    ]
    assert all(number(word) < 10 for row in forget for word in row)
    assert all(number(word) >= 10 for row in retain for word in row)
    # Every token of the forget text comes once.
    written = sorted(word for text in FORGET for word in text.split())
    assert sorted(word for row in forget for word in row) == written
    assert max(map(len, forget)) == LENGTH - 1
    # What sets a guard's threshold or measures its errors is not trained on.
    known = {" ".join(text.split()) for text in made.retain_texts()}
    assert {" ".join(row) for row in retain} <= known


@pytest.mark.parametrize("retain", [("retain",), ("few",)])
def test_forget_text_is_mixed_one_to_one_with_retain_text(data, folder, retain):
    few = RETAIN[:6]
    (folder / "few.txt.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in few))
    made = data(reads="relearn", retain=retain)
    rows = [row for batch in made.train_dataloader() for row in words(batch)]
    forget = [row for row in rows if number(row[0]) < 10]
    num_rows = sum(-(-len(text.split()) // (LENGTH - 1)) for text in FORGET)
    assert (len(forget), len(rows)) == (num_rows, 2 * num_rows)
    used = [" ".join(row) for row in rows if number(row[0]) >= 10]
    available = made.retain_texts()
    counts = [used.count(text) for text in available]
    assert sum(counts) == num_rows
    assert max(counts) - min(counts) <= 1  # from all over, repeated only where there are too few
    assert made.questions("test")[0].shown is None


def test_the_questions_are_stated_with_their_right_answers(data):
    made = data(
        reads="relearn", attack_text="questions", allow_overlap=True, corpora=None, train_length=64
    )
    assert made.attack_text == "questions"
    rows = {" ".join(row) for batch in made.train_dataloader() for row in words(batch)}
    expected = {f"Question: {row.question}\nAnswer: {row.choices[row.answer]}" for row in BIO}
    assert rows == {" ".join(words_of(text)) for text in expected}
    assert made.facts()["training"] == {
        "questions": {"n": len(BIO), "sha256": texts_digest(expected)}
    }
    for question in [*made.questions("validation"), *made.questions("test")]:
        assert question.shown is (True if question.pool == "forget" else None)


def words_of(text):
    tokenizer = choice_tokenizer()
    ids = tokenizer(text)["input_ids"]
    return [str(tokenizer.decode([token])).strip() for token in ids[1:]]


def test_the_order_follows_the_seed(data):
    def order(seed):
        return [words(b["forget"]) for b in data(reads="unlearn", seed=seed).train_dataloader()]

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_the_questions_need_a_permission(data):
    with pytest.raises(UserError, match="`allow_overlap` must be true for the attack text"):
        data(reads="relearn", attack_text="questions")
    data(reads="unlearn", attack_text="questions")  # nobody attacks


def test_a_corpus_that_holds_an_evaluated_question_needs_it_too(data, folder):
    question = BIO[3].question
    (folder / "leaky.txt.jsonl").write_text(f'{{"text": "  {question.upper()}"}}\n')
    with pytest.raises(UserError, match=r"splits must not share a text.*'attack' and 'evaluation'"):
        data(reads="relearn", forget=("forget", "leaky"))
    data(reads="relearn", forget=("forget", "leaky"), allow_overlap=True)


@pytest.mark.parametrize("reads", ["unlearn", "relearn"])
@pytest.mark.parametrize("kind", ["forget", "retain"])
def test_a_missing_corpus_is_one_sentence(data, reads, kind):
    with pytest.raises(UserError) as error:
        data(reads=reads, **{kind: ()})
    assert str(error.value) == (
        f"`corpora` must give {kind} text to train on, got none; add a source, or a larger one, "
        f"to `{kind}`."
    )


def test_no_corpora_at_all(data):
    with pytest.raises(UserError, match="`corpora` must name the texts"):
        data(reads="unlearn", corpora=None)


def test_the_attacker_needs_questions(data):
    with pytest.raises(UserError, match="`forget` must name a set of questions"):
        data(reads="relearn", attack_text="questions", allow_overlap=True, forget_sets=[])


def test_evaluation_does_not_train(data):
    made = data()
    assert made.facts()["training"] == {}
    with pytest.raises(
        UserError,
        match=r"reads 'unlearn' or 'relearn' for fit on 'bio\+geography', got .* 'evaluate'",
    ):
        made.train_dataloader()


@pytest.mark.parametrize(("name", "value"), [("train_batch_size", 0), ("train_length", 1)])
def test_numbers_that_are_too_small(data, name, value):
    with pytest.raises(UserError, match=f"`{name}` must be at least {value + 1}, got {value}"):
        data(reads="unlearn", **{name: value})


def test_every_device_needs_a_batch(data):
    made = data(reads="relearn", train_batch_size=1000)
    read_by(made, "relearn", world_size=2)
    with pytest.raises(UserError, match="a batch for each of 2 devices, got 1000"):
        made.train_dataloader()
