"""The loader of a selection: every text once, and all ranks at the same purpose."""

from types import SimpleNamespace

import pytest

from datamodules import TextFilesData, TinyWorldData
from dsg.errors import UserError
from dsg.guard.recipes import GuardSettings
from dsg.lm.tokens import encode_texts
from dsg.selection.splits import FORGET_FRACTIONS, split_by_hash
from tests.helpers import tiny_tokenizer
from tests.text_writer import write_both

PURPOSES = [
    "forget_selection",
    "retain_selection",
    "retain_calibration",
    "retain_heldout",
    "forget_heldout",
]


def prepare(data, rank: int = 0, world_size: int = 1, **settings):
    guard_settings = GuardSettings("unused", "unused", **{"batch_size": 7, **settings})
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        lightning_module=SimpleNamespace(reads="select", guard_settings=guard_settings),
    )
    data.setup("validate")
    return data


def text_files(folder):
    forget, retain = write_both(folder)
    return TextFilesData(str(folder / "model"), [forget], [retain])


def tiny_world(folder):
    return TinyWorldData(str(folder / "model"))


@pytest.fixture
def folder(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def rows_of(batch) -> list[list[int]]:
    tokens = batch["tokens"]
    return [
        [token for token, real in zip(ids, mask, strict=True) if real]
        for ids, mask in zip(tokens.input_ids.tolist(), tokens.attention_mask.tolist(), strict=True)
    ]


@pytest.mark.parametrize("make", [text_files, tiny_world])
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_ranks_together_read_every_text_once(folder, make, world_size):
    ranks = [prepare(make(folder), rank, world_size, max_length=20) for rank in range(world_size)]
    loaders = [list(data.val_dataloader()) for data in ranks]
    assert len({len(batches) for batches in loaders}) == 1
    found = {purpose: {} for purpose in PURPOSES}
    order = []
    for step in zip(*loaders, strict=True):
        [purpose] = {batch["purpose"] for batch in step}
        order.append(purpose)
        for batch in step:
            if batch["tokens"] is None:
                assert len(batch["ids"]) == 0
                continue
            assert len(batch["ids"]) <= 7
            for id, row in zip(batch["ids"].tolist(), rows_of(batch), strict=True):
                assert id not in found[purpose]
                found[purpose][id] = row
    assert list(dict.fromkeys(order)) == PURPOSES
    data = ranks[0]
    selection, heldout = split_by_hash(data.forget_texts(), FORGET_FRACTIONS)
    texts = {
        "forget_selection": selection,
        "retain_selection": data.retain_texts(),
        "retain_calibration": data.calibration_texts(near=False),
        "retain_heldout": data.heldout_texts(),
        "forget_heldout": heldout,
    }
    for purpose in PURPOSES:
        expected = dict(enumerate(encode_texts(data.tokenizer, texts[purpose], 20)))
        assert found[purpose] == expected


def test_near_texts_are_for_the_method_that_asks_for_them(folder):
    counts = []
    for method in ("dsg", "dsg_near"):
        batches = prepare(tiny_world(folder), method=method).val_dataloader()
        ids = [b["ids"] for b in batches if b["purpose"] == "retain_calibration"]
        counts.append(sum(map(len, ids)))
    plain = tiny_world(folder)
    assert counts == [len(plain.calibration_texts(near)) for near in (False, True)]
    assert counts[0] < counts[1]


def test_purposes_that_share_a_text(folder, monkeypatch):
    data = prepare(tiny_world(folder))
    monkeypatch.setattr(data, "heldout_texts", lambda: data.calibration_texts(False)[:1])
    with pytest.raises(UserError, match=r"'retain_calibration' and 'retain_heldout'"):
        data.val_dataloader()


def test_nothing_to_fit(folder):
    with pytest.raises(UserError, match="got one that reads 'select'"):
        prepare(tiny_world(folder)).train_dataloader()
