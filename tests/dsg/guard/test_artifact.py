import errno
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from dsg.errors import UserError
from dsg.guard.artifact import SETTINGS_FILE, TENSORS_FILE
from dsg.guard.guard import Guard
from tests.guard_reference import make_guard
from tests.helpers import jumprelu_sae, random_ids, tiny_model


@pytest.fixture
def saved(tmp_path):
    guard = make_guard(
        jumprelu_sae(),
        threshold=1 / 3,
        clamp_scope="active",
        clamp_unit="residual_norm",
        residual_norm=3.1,
        facts={"model": "tiny", "scores": (1.5, 2), "by_id": {3: 0.5, 12: 1}},
    )
    guard.save(tmp_path / "bio")
    return guard, tmp_path / "bio"


def test_round_trip_is_exact(saved):
    guard, folder = saved
    loaded = Guard.load(folder)
    for name, tensor in guard.named_buffers():
        assert torch.equal(loaded.get_buffer(name), tensor), name
    for name in ("hook_point", "pad_id", "clamp_scope", "clamp_unit", "residual_norm", "gate"):
        assert getattr(loaded, name) == getattr(guard, name)
    assert loaded.facts == {"model": "tiny", "scores": [1.5, 2], "by_id": {"3": 0.5, "12": 1}}
    assert loaded.uncounted_ids == [0, 1, 2]
    model, ids = tiny_model(), random_ids(3, 6)
    outputs = []
    for each in (guard, loaded):
        with each.attached(model):
            outputs.append(model(ids).logits)
    assert torch.equal(*outputs)


def test_saving_again_replaces_and_leaves_nothing_else(saved):
    guard, folder = saved
    guard.replace(threshold=0.5).save(folder)
    assert Guard.load(folder).threshold == 0.5
    assert {path.name for path in folder.iterdir()} == {SETTINGS_FILE, TENSORS_FILE}


def test_no_pickle_in_the_files(saved):
    _, folder = saved
    json.loads((folder / SETTINGS_FILE).read_text())
    assert int.from_bytes((folder / TENSORS_FILE).read_bytes()[:8], "little") < 10_000


@pytest.mark.parametrize("name", [SETTINGS_FILE, TENSORS_FILE])
def test_missing_file(saved, name):
    _, folder = saved
    (folder / name).unlink()
    with pytest.raises(UserError, match=r"`directory` must hold guard.json and guard.safetensors"):
        Guard.load(folder)


@pytest.mark.parametrize("position", [0, 100, -1])
def test_one_flipped_byte_in_the_tensors(saved, position):
    _, folder = saved
    blob = bytearray((folder / TENSORS_FILE).read_bytes())
    blob[position] ^= 1
    (folder / TENSORS_FILE).write_bytes(blob)
    with pytest.raises(UserError, match=r"guard.safetensors must be as `save` wrote it"):
        Guard.load(folder)


def test_truncated_files(saved):
    _, folder = saved
    for name in (TENSORS_FILE, SETTINGS_FILE):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(UserError, match="is damaged or was altered"):
            Guard.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["settings"].update(threshold=0.99),
        lambda header: header["settings"].update(clamp_value=0.0),
        lambda header: header["settings"].pop("gate"),
        lambda header: header.pop("sha256"),
        lambda header: header.update(tensors_sha256="0" * 64),
    ],
)
def test_altered_settings(saved, change):
    _, folder = saved
    header = json.loads((folder / SETTINGS_FILE).read_text())
    change(header)
    (folder / SETTINGS_FILE).write_text(json.dumps(header))
    with pytest.raises(UserError, match=r"guard.json must be as `save` wrote it"):
        Guard.load(folder)


def test_foreign_and_newer_formats(saved):
    _, folder = saved
    header = json.loads((folder / SETTINGS_FILE).read_text())
    (folder / SETTINGS_FILE).write_text(json.dumps({**header, "format_version": 3}))
    with pytest.raises(UserError, match="must have format_version 2, got 3; load it with"):
        Guard.load(folder)
    for foreign in ('{"format": "other"}', "[1]"):
        (folder / SETTINGS_FILE).write_text(foreign)
        with pytest.raises(UserError, match="must be a guard of format 'dynamic-sae-guardrails'"):
            Guard.load(folder)


def resealed(folder, tensors, **settings):
    """A folder whose hashes are right although its contents make no sense."""
    from dsg.guard.artifact import write_artifact

    header = json.loads((folder / SETTINGS_FILE).read_text())
    write_artifact(folder, tensors, {**header["settings"], **settings})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("W_dec", torch.full((3, 16), torch.nan), "`W_dec` must be finite"),
        ("b_enc", torch.zeros(5), "`b_enc` must have shape"),
        ("feature_ids", torch.tensor([1, 1, 2]), "`feature_ids` must be at least one id, unique"),
        ("feature_ids", torch.tensor([-1, 1, 2]), "`feature_ids` must be at least one id"),
    ],
)
def test_contents_are_checked_behind_correct_hashes(saved, name, value, message):
    guard, folder = saved
    resealed(folder, {**dict(guard.features.named_buffers()), name: value})
    with pytest.raises(UserError, match=message):
        Guard.load(folder)


def test_settings_are_checked_behind_correct_hashes(saved):
    guard, folder = saved
    resealed(folder, dict(guard.features.named_buffers()), threshold=2.0)
    with pytest.raises(UserError, match="`threshold` must be a density"):
        Guard.load(folder)


def test_other_tensors_are_refused(saved):
    guard, folder = saved
    resealed(folder, {**dict(guard.features.named_buffers()), "extra": torch.zeros(1)})
    with pytest.raises(UserError, match="must be those of a guard's features"):
        Guard.load(folder)
    save_file({"x": torch.zeros(1)}, folder / TENSORS_FILE)
    with pytest.raises(UserError, match="is damaged or was altered"):
        Guard.load(folder)


def test_facts_must_be_json(tmp_path):
    for facts in ({"x": float("nan")}, {"x": torch.zeros(1)}):
        with pytest.raises(UserError, match="`facts` must hold only finite numbers"):
            make_guard(jumprelu_sae(), facts=facts).save(tmp_path)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(saved):
    _, folder = saved
    for name in (TENSORS_FILE, SETTINGS_FILE):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(UserError, match="it is a pipe, a socket or a device"):
            Guard.load(folder)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"settings":' * 100_000, "\xff", '{"format": NaN}', "9" * 5000]
)
def test_settings_that_are_hardly_json(saved, text):
    _, folder = saved
    (folder / SETTINGS_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"must be as `save` wrote it|must be a guard of"):
        Guard.load(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clamp_value", "-500.0"),
        ("clamp_value", None),
        ("clamp_value", [1.0]),
        ("clamp_value", True),
        ("threshold", "0.5"),
        ("threshold", None),
        ("residual_norm", "3"),
        ("trigger_limit", {}),
        ("hook_point", 3),
        ("uncounted_ids", "abc"),
        ("uncounted_ids", [0.5]),
        ("uncounted_ids", 7),
        ("pad_id", "0"),
        ("gate", 1),
        ("window_size", "8"),
        ("leak", [0.1]),
        ("facts", [1]),
        ("model", {"name": "x"}),
        ("model", [1]),
        ("encoder", []),
        ("encoder", {"kind": "slice", "normalization": 1}),
    ],
)
def test_settings_of_another_kind_are_refused_by_name(saved, name, value):
    guard, folder = saved
    resealed(folder, dict(guard.features.named_buffers()), **{name: value})
    wanted = {"encoder": "fit its encoder|`normalization` must be one of"}.get(name, f"`{name}`")
    with pytest.raises(UserError, match=wanted):
        Guard.load(folder)


def full_disk_at(monkeypatch, step, time):
    """The n-th call of `os.fsync` or `os.replace` finds no room."""
    real, calls = getattr(os, step), []

    def full(*args):
        calls.append(step)
        if len(calls) == time:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, step, full)


@pytest.mark.parametrize(("step", "time"), [("fsync", 1), ("fsync", 2), ("replace", 1)])
def test_a_full_disk_leaves_the_older_guard(saved, monkeypatch, step, time):
    guard, folder = saved
    other = make_guard(jumprelu_sae(seed=1), threshold=0.9)
    full_disk_at(monkeypatch, step, time)
    with pytest.raises(
        UserError, match=r"\(no space left on device\), in which nothing was changed"
    ):
        other.save(folder)
    monkeypatch.undo()
    assert Guard.load(folder).threshold == guard.threshold
    assert {path.name for path in folder.iterdir()} == {SETTINGS_FILE, TENSORS_FILE}
    other.save(folder)
    assert Guard.load(folder).threshold == 0.9


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "guard").write_text("")
    with pytest.raises(UserError, match="`directory` must be a folder that can be written"):
        make_guard(jumprelu_sae()).save(tmp_path / "guard")
