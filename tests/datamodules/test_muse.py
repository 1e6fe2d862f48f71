"""MUSE from a folder in the hub's layout: items, halves, guards' texts, training text, refusals."""

import json

import pytest
import torch

from datamodules.muse import MuseData
from dsg.errors import UserError
from dsg.evaluation.items import Prompt
from dsg.io.results import read_results
from dsg.selection.splits import check_texts, guard_texts
from lightning_modules import EvaluationModule
from tests.benchmark_folders import RAW_WORDS, sentence, write_muse
from tests.datamodules.reading import read_by
from tests.helpers import BOS
from tests.lightning_modules.toy import guard_settings, make_trainer, save_toy

NUM = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and a tiny copy of MUSE."""
    folder = save_toy(tmp_path_factory.mktemp("muse"))
    write_muse(folder / "MUSE-News", NUM)
    return folder


def make_data(folder, reads="evaluate", **options):
    settings = {"retrained": "official", "max_length": 32, "num_words": 16, **options}
    made = MuseData(str(folder / "model"), dataset=str(folder / "MUSE-News"), **settings)
    data = read_by(made, reads)
    data.setup("test")
    return data


def test_items_are_those_of_the_benchmark(folder):
    data = make_data(folder)
    assert data.questions("test") == []
    passages = data.passages("test")
    assert [p.domain for p in passages] == ["forget"] * NUM + ["retain"] * NUM + ["holdout"] * NUM
    prompts = data.prompts("test")
    assert [p.domain for p in prompts] == (
        ["verbmem_forget"] * NUM + ["knowmem_forget"] * NUM + ["knowmem_retain"] * (NUM + 1)
    )
    for items in (passages, prompts):
        assert [item.id for item in items] == list(range(len(items)))
        assert len({item.key for item in items}) == len(items)
    key = prompts[0].key
    assert prompts[0] == Prompt(
        0,
        "verbmem_forget",
        sentence(1, 2, 0, 7),
        sentence(*range(9)),
        max_new_tokens=128,
        max_reference_tokens=128,
        key=key,
    )
    known = prompts[NUM]
    assert known.text == (
        f"Question: {sentence(11, 0, 3)}\nAnswer: {sentence(1, 11)}\n\n"
        f"Question: {sentence(11, 1, 4)}\nAnswer: {sentence(2, 11)}\n\n"
        f"Question: {sentence(3, 0, 3)}\nAnswer: "
    )
    assert (known.reference, known.max_new_tokens) == (sentence(1, 3), 32)
    assert known.stop == ("\n\n", "\nQuestion", "Question:")
    assert known.max_reference_tokens is None


def test_halves_part_the_items(folder):
    data = make_data(folder, items="halves")
    assert data.val_split == "validation"
    whole = make_data(folder)
    assert whole.val_split == "test"
    for kind in ("passages", "prompts"):
        keys = [{item.key for item in getattr(data, kind)(s)} for s in ("validation", "test")]
        assert all(keys)
        assert not keys[0] & keys[1]
        assert keys[0] | keys[1] == {item.key for item in getattr(whole, kind)("test")}


def test_no_two_uses_of_a_guard_share_a_text(folder):
    data = make_data(folder)
    texts = guard_texts(data, near=False)
    assert all(texts.values())
    check_texts(texts)
    evaluated = {p.text for p in data.passages("test") if p.domain != "forget"}
    assert not evaluated & {text for part in texts.values() for text in part}
    assert max(len(text.split()) for part in texts.values() for text in part) == 16
    # Three pieces of each text, the last of which is short.
    assert len(data.forget_texts()) == NUM * -(-RAW_WORDS // 16)
    assert len(make_data(folder, max_texts=2).forget_texts()) == 2


@pytest.mark.parametrize(
    ("forget_set", "first", "count"),
    [("raw", sentence(0, 2), NUM), ("scal_3", sentence(3, 5), 6), ("sust_2", sentence(31, 33), 3)],
)
def test_forget_set_is_chosen(folder, forget_set, first, count):
    data = make_data(folder, forget_set=forget_set, num_words=1000)
    texts = data.forget_texts()
    assert len(texts) == count
    assert texts[0].startswith(first)


def rows_of(loader):
    return [
        ids[mask.bool()].tolist()
        for batch in loader
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]


def written(folder, *splits):
    """All tokens of raw text, however it is cut into rows."""
    data = make_data(folder)
    texts = [text for split in splits for text in data._column("raw", split)]
    return sorted(int(word[1:]) + 4 for text in texts for word in text.split())


@pytest.mark.parametrize(
    ("finetune_on", "splits"),
    [("target", ("forget", "retain1", "retain2")), ("retrained", ("retain1", "retain2"))],
)
def test_finetuning_text_holds_every_token_once(folder, finetune_on, splits):
    data = make_data(folder, reads="finetune", finetune_on=finetune_on, retrained=None)
    rows = rows_of(data.train_dataloader())
    assert {row[0] for row in rows} == {BOS}
    assert max(map(len, rows)) == 32
    assert sorted(token for row in rows for token in row[1:]) == written(folder, *splits)
    assert data.facts()["training"]["n"] == len(splits) * NUM + (2 * NUM)


def test_unlearning_pairs_every_forget_row_with_retain_text(folder):
    batches = list(make_data(folder, reads="unlearn").train_dataloader())
    tokens = [token for row in rows_of([b["forget"] for b in batches]) for token in row]
    assert sorted(token for token in tokens if token != BOS) == written(folder, "forget")
    assert all(len(b["forget"].input_ids) == len(b["retain"].input_ids) for b in batches)


def test_the_attacker_gets_half_of_the_forget_text(folder):
    rows = rows_of(make_data(folder, reads="relearn", allow_overlap=True).train_dataloader())
    loader = make_data(folder, reads="unlearn").train_dataloader()
    forget = [row for batch in loader for row in rows_of([batch["forget"]])]
    shown = [row for row in rows if row in forget]
    assert (len(forget), len(shown), len(rows)) == (2 * NUM, NUM, 2 * NUM)


def test_evaluation_writes_the_benchmark_numbers(folder, tmp_path):
    """`test` with a guard; PrivLeak is that of the AUC which another run measured."""
    reference = make_data(folder, retrained="self")
    trainer = make_trainer(tmp_path / "retrained")
    trainer.test(EvaluationModule(str(folder / "model")), reference, verbose=False)
    rows = read_results(tmp_path / "retrained")
    [auc] = [row for row in rows if row["metric"] == "min_k_auc"]
    assert auc["n"] == 2 * NUM
    assert not [row for row in rows if row["metric"] == "privleak"]

    data = make_data(folder, retrained=str(tmp_path / "retrained"))
    module = EvaluationModule(str(folder / "model"), guard=guard_settings(folder))
    make_trainer(tmp_path / "guarded").test(module, data, verbose=False)
    found = {
        (row["guard"], row["domain"], row["metric"]): row
        for row in read_results(tmp_path / "guarded")
        if row["protocol"] == "muse"
    }
    names = [("forget", "verbmem"), ("forget", "knowmem"), ("retain", "knowmem")]
    names += [("forget", "min_k_auc"), ("forget", "privleak")]
    assert set(found) == {(guard, *name) for guard in ("off", "on") for name in names}
    assert {row["dataset"] for row in found.values()} == {"muse_news"}
    off = found["off", "forget", "privleak"]
    # Without the guard it is the very model that the reference was measured on.
    assert off["value"] == pytest.approx(0.0, abs=1e-3)
    assert off["low"] < 0 < off["high"]
    on = found["on", "forget", "privleak"]["value"]
    assert on == pytest.approx(
        (found["on", "forget", "min_k_auc"]["value"] - auc["value"]) / auc["value"] * 100, abs=1e-2
    )


def test_numbers_do_not_depend_on_batches(folder, tmp_path):
    written = []
    for size in (2, "auto"):
        run = tmp_path / str(size)
        data = make_data(folder, retrained="self", batch_size=size)
        make_trainer(run).test(EvaluationModule(str(folder / "model")), data, verbose=False)
        rows = [row for row in read_results(run) if row["protocol"] == "muse"]
        written.append({(row["domain"], row["metric"]): row["value"] for row in rows})
    assert written[0] == pytest.approx(written[1], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retrained": None}, "dsg fit -c configs/finetune/muse_retrained.yaml"),
        ({"reads": "relearn"}, "`allow_overlap` must be true for the attack text 'forget'"),
        ({"corpus": "books", "forget_set": "sust_1"}, "must be 'raw', got 'sust_1'"),
    ],
)
def test_wrong_settings_are_refused(folder, options, message):
    with pytest.raises(UserError, match=message):
        make_data(folder, **options)


def test_a_reference_that_is_missing_is_refused_before_anything_is_computed(folder, tmp_path):
    data = make_data(folder)
    data.retrained = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"dsg test -c configs/evaluate/muse_news\.yaml"):
        data.setup("test")


def test_evaluation_trains_nothing(folder):
    with pytest.raises(UserError, match="reads 'finetune' or 'unlearn' or 'relearn' for fit"):
        make_data(folder).train_dataloader()


def test_a_blank_text_is_refused_by_its_place(folder, tmp_path):
    broken = write_muse(tmp_path / "MUSE-News", 2)
    import pyarrow
    import pyarrow.parquet

    file = broken / "privleak" / "holdout-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["w1", " "]}), file)
    with pytest.raises(UserError, match=r"privleak/holdout, row 1 must hold a text with a word"):
        MuseData(str(folder / "model"), dataset=str(broken), retrained="official").setup("test")


def test_facts_name_no_place_on_this_machine(folder):
    facts = make_data(folder).facts()
    assert facts["dataset"] == "MUSE-News"
    assert facts["forget"]["n"] == NUM
    assert str(folder) not in json.dumps(facts)


def test_scores_are_those_of_the_items(folder, tmp_path):
    """The AUC equals one computed from the passages' own scores in the run's items."""
    data = make_data(folder, retrained="self")
    module = EvaluationModule(str(folder / "model"))
    make_trainer(tmp_path).test(module, data, verbose=False)
    values = module.measurer.samples["none", "passages"]["min_k"]
    forget, holdout = values[:NUM], values[2 * NUM :]
    wins = (holdout[:, None] > forget).double() + 0.5 * (holdout[:, None] == forget)
    [row] = [row for row in read_results(tmp_path) if row["metric"] == "min_k_auc"]
    assert row["value"] == pytest.approx(float(torch.mean(wins)), abs=1e-6)
