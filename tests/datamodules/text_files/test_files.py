import hashlib
import itertools
import json

import pytest

from datamodules import TextFilesCorpus, TextFilesData
from datamodules.text_files.data import spread
from datamodules.text_files.files import (
    MAX_WORDS,
    MIN_PASSAGES,
    MIN_WORDS,
    file_facts,
    read_passages,
    read_uses,
)
from dsg.errors import UserError
from tests.datamodules.reading import read_by
from tests.helpers import tiny_tokenizer
from tests.text_writer import RETAIN_WORDS, write_both, write_text


def words(first: int, last: int) -> str:
    return " ".join(f"x{index}" for index in range(first, last))


@pytest.fixture
def data(tmp_path):
    forget, retain = write_both(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path / "model")

    def make(reads="evaluate", **settings):
        made = TextFilesData(str(tmp_path / "model"), [forget], [retain], **settings)
        read_by(made, reads)
        made.setup("test")
        return made

    return make


class TestReadPassages:
    def test_joins_short_paragraphs_and_normalises_space(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_text(f"{words(0, 40)}\n\n  {words(40, 70)}\n\n\n{words(70, 135)}\n\nx y z")
        assert read_passages(path) == [words(0, 70), words(70, 135)]

    def test_cuts_long_paragraphs_and_keeps_the_rest(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_text(words(0, 2 * MAX_WORDS + 35))
        found = read_passages(path)
        assert [len(passage.split()) for passage in found] == [MAX_WORDS, MAX_WORDS, 35]
        assert " ".join(found) == words(0, 2 * MAX_WORDS + 35)

    def test_windows_lines_and_byte_order_mark(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_bytes(("\ufeff" + f"{words(0, 65)}\n\n{words(65, 130)}").encode()
                         .replace(b"\n", b"\r\n"))  # fmt: skip
        assert read_passages(path) == [words(0, 65), words(65, 130)]

    def test_jsonl_is_parsed_as_json(self, tmp_path):
        path = tmp_path / "a.jsonl"
        texts = [words(0, 64) + ' "quoted"\u2028', words(64, 130)]
        path.write_text(
            "\n\n".join(json.dumps({"text": t, "id": 1}, ensure_ascii=False) for t in texts)
        )
        assert read_passages(path) == [" ".join(text.split()) for text in texts]

    def test_never_joins_files(self, tmp_path):
        for name in "ab":
            (tmp_path / f"{name}.txt").write_text(words(0, MIN_WORDS // 2 - 1))
        with pytest.raises(UserError, match=r"at least 40 different passages.*got 0 in 2 file"):
            read_uses([tmp_path / "a.txt", tmp_path / "b.txt"], [tmp_path / "a.txt"])

    def test_missing_file(self, tmp_path):
        with pytest.raises(UserError, match=r"gone\.txt' cannot be read \(no such file"):
            read_passages(tmp_path / "gone.txt")

    def test_folder(self, tmp_path):
        with pytest.raises(UserError, match=r"cannot be read \(is a directory"):
            read_passages(tmp_path)

    @pytest.mark.parametrize("content", ["", " \n\n \t\n"])
    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_empty_file(self, tmp_path, name, content):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match="is empty; give one with text"):
            read_passages(tmp_path / name)

    def test_binary_file(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"PK\x00\x01")
        with pytest.raises(UserError, match=r"is binary \(it holds zero bytes\)"):
            read_passages(tmp_path / "a.txt")

    def test_other_encoding(self, tmp_path):
        (tmp_path / "a.txt").write_bytes("na\u00efve".encode("latin-1"))
        with pytest.raises(UserError, match=r"not text in UTF-8 \(byte 2 is the first"):
            read_passages(tmp_path / "a.txt")

    @pytest.mark.parametrize(
        ("line", "got"),
        [
            ("{broken", "must be a JSON object"),
            ('{"txt": "a"}', r"got the keys \['txt'\]"),
            ('{"text": 3}', r"got the keys \['text'\]"),
            ('["text"]', "got list"),
        ],
    )
    def test_jsonl_line_without_text(self, tmp_path, line, got):
        (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n' + line)
        with pytest.raises(UserError, match=rf"a\.jsonl, line 3.*{got}"):
            read_passages(tmp_path / "a.jsonl")


class TestReadUses:
    def test_uses_are_disjoint_and_complete(self, tmp_path):
        forget_file, retain_file = write_both(tmp_path)
        forget, retain = read_uses([forget_file], [retain_file])
        for uses, file in ((forget, forget_file), (retain, retain_file)):
            dealt = list(itertools.chain(*vars(uses).values()))
            assert sorted(dealt) == sorted(read_passages(file))
            assert len(set(dealt)) == len(dealt)
        assert {name: len(texts) for name, texts in vars(forget).items()} == {
            "memorised": 15, "unseen": 15, "running": 30,
            "attack": 0, "calibration": 0, "heldout": 0,
        }  # fmt: skip
        assert {name: len(texts) for name, texts in vars(retain).items()} == {
            "memorised": 18, "unseen": 18, "running": 36,
            "attack": 12, "calibration": 18, "heldout": 18,
        }  # fmt: skip

    def test_hash_decides(self, tmp_path):
        forget_file, retain_file = write_both(tmp_path)
        forget, _ = read_uses([forget_file], [retain_file])

        def digest(text):
            return hashlib.sha256(text.casefold().encode()).hexdigest()

        ordered = sorted(read_passages(forget_file), key=digest)
        assert (forget.memorised, forget.unseen) == (ordered[:15], ordered[15:30])

    def test_order_of_files_moves_nothing(self, tmp_path):
        forget_file, retain_file = write_both(tmp_path)
        other = write_text(tmp_path / "other.txt", RETAIN_WORDS, 30, seed=1)
        _, one = read_uses([forget_file], [retain_file, other])
        _, two = read_uses([forget_file], [other, retain_file])
        assert {n: sorted(t) for n, t in vars(one).items()} == {
            n: sorted(t) for n, t in vars(two).items()
        }

    def test_repeated_passages_count_once(self, tmp_path):
        forget_file, retain_file = write_both(tmp_path)
        again = tmp_path / "again.txt"
        again.write_text(forget_file.read_text().upper())
        assert read_uses([forget_file, again], [retain_file]) == read_uses(
            [forget_file], [retain_file]
        )

    @pytest.mark.parametrize("kind", ["forget", "retain"])
    def test_too_little_text(self, tmp_path, kind):
        sizes = {"num_forget": 60, "num_retain": 120} | {f"num_{kind}": MIN_PASSAGES[kind] - 1}
        forget, retain = write_both(tmp_path, **sizes)
        wanted = f"--{kind} needs at least {MIN_PASSAGES[kind]} .*got {MIN_PASSAGES[kind] - 1} in 1"
        with pytest.raises(UserError, match=wanted):
            read_uses([forget], [retain])

    def test_the_same_file_twice(self, tmp_path):
        _, retain = write_both(tmp_path)
        with pytest.raises(UserError, match="must not share passages, got 120 of the 120 retain"):
            read_uses([retain], [retain])

    def test_shared_text_is_found_wherever_it_is_cut(self, tmp_path):
        forget, retain = write_both(tmp_path)
        stolen = read_passages(forget)[:3]
        retain.write_text(f"{words(0, 25)} {' '.join(stolen)}\n\n{retain.read_text()}")
        with pytest.raises(UserError, match=r"got [23] of the .* such as 'x0|got [23] of the"):
            read_uses([forget], [retain])


class TestTextFilesData:
    def test_splits_are_disjoint(self, data):
        made = data()
        groups = [made.forget_texts(), made.retain_texts(), made.heldout_texts()]
        groups += [made.calibration_texts(near=True), made.retain.attack]
        for made.part in ("memorised", "unseen"):
            for split in ("validation", "test"):
                passages = made.passages(split)
                assert [passage.id for passage in passages] == list(range(len(passages)))
                assert {passage.domain for passage in passages} == {"forget", "retain"}
                groups.append([passage.text for passage in passages])
        texts = list(itertools.chain(*groups))
        assert len(set(texts)) == len(texts) == 180
        assert made.questions("test") == []

    def test_a_third_is_for_validation(self, data):
        made = data()
        assert len(made.passages("validation")) == 5 + 6
        assert len(made.passages("test")) == 10 + 12

    def test_attack_shows_half_and_mixes_evenly(self, data):
        made = data(reads="relearn", allow_overlap=True, val_split="test", train_batch_size=4)
        batches = list(made.train_dataloader())
        assert sum(len(batch.input_ids) for batch in batches) == 2 * 8
        shown = {p.text: p.shown for s in ("validation", "test") for p in made.passages(s)}
        forget = [told for told in shown.values() if told is not None]
        assert (forget.count(True), forget.count(False)) == (8, 7)
        assert {text for text, told in shown.items() if told} == set(made._shown())
        assert set(made.forget.memorised) == {t for t, told in shown.items() if told is not None}

    def test_evaluation_scores_each_passage_once(self, data):
        made = data(batch_size=5, val_split="test")
        for [loader] in (made.val_dataloader(), made.test_dataloader()):
            ids = [id for batch in loader for id in batch.ids.tolist()]
            assert sorted(ids) == list(range(len(made.passages("test"))))

    def test_relearn_needs_allow_overlap(self, data):
        with pytest.raises(UserError, match="`allow_overlap` must be true"):
            data(reads="relearn")

    def test_evaluate_has_nothing_to_fit(self, data):
        with pytest.raises(UserError, match="reads 'relearn' for fit on 'text/memorised'"):
            data().train_dataloader()


def test_corpus_leaves_out_what_must_stay_unseen(tmp_path):
    forget_file, retain_file = write_both(tmp_path)
    corpus = TextFilesCorpus(
        [forget_file], [retain_file], repetitions=3, vocab_size=200, context_length=16
    )
    corpus.setup("fit")
    text = corpus.tokenizer.decode(corpus.blocks.flatten(), skip_special_tokens=False)
    seen = " ".join(text.replace("<bos>", " ").split()).split("<eos>")
    counts = {
        use: {sum(part.strip() == t for part in seen) for kind in uses for t in getattr(kind, use)}
        for uses in [read_uses([forget_file], [retain_file])]
        for use in ("memorised", "unseen", "running", "attack", "calibration", "heldout")
    }
    # The last block is incomplete and dropped, and one memorised passage with it.
    assert counts["memorised"] <= {2, 3}
    assert counts["running"] == counts["attack"] == {1}
    assert counts["unseen"] == counts["calibration"] == counts["heldout"] == {0}


def test_spread_takes_from_everywhere():
    texts = [str(index) for index in range(10)]
    assert spread(texts, 10) == spread(texts, 99) == texts
    assert spread(texts, 4) == ["0", "3", "6", "9"]


def test_file_facts_name_no_place(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_facts([tmp_path / "a.txt"]) == [{"name": "a.txt", "size": 3, "sha256": digest}]
