import errno
import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from dsg.errors import UserError
from dsg.guard.artifact import SETTINGS_FILE, TENSORS_FILE
from dsg.guard.edit import Clamp, Refusal
from dsg.guard.gate import CusumGate, DensityGate, OpenGate, WindowGate
from dsg.guard.guard import Guard
from dsg.sae.loading import slice_features
from tests.guard_reference import FEATURES, make_guard
from tests.helpers import HOOK_POINT, jumprelu_sae, random_ids, tiny_model


@pytest.fixture
def saved(tmp_path):
    guard = make_guard(
        jumprelu_sae(),
        gate=DensityGate(1 / 3),
        edit=Clamp(-20.0, "active", unit="residual_norm", residual_norm=3.1),
        facts={"model": "tiny", "scores": (1.5, 2), "by_id": {3: 0.5, 12: 1}},
    )
    guard.save(tmp_path / "bio")
    return guard, tmp_path / "bio"


def test_round_trip_is_exact(saved):
    guard, folder = saved
    loaded = Guard.load(folder)
    for name, tensor in guard.named_buffers():
        assert torch.equal(loaded.get_buffer(name), tensor), name
    for name in ("hook_point", "pad_id", "gate", "edit"):
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
        lambda header: header["settings"]["gate"].update(threshold=0.99),
        lambda header: header["settings"]["edit"].update(value=0.0),
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
    (folder / SETTINGS_FILE).write_text(json.dumps({**header, "format_version": 4}))
    with pytest.raises(UserError, match="must have format_version 2 or 3, got 4; load it with"):
        Guard.load(folder)
    for foreign in ('{"format": "other"}', "[1]"):
        (folder / SETTINGS_FILE).write_text(foreign)
        with pytest.raises(UserError, match="must be a guard of format 'dynamic-sae-guardrails'"):
            Guard.load(folder)


def seal(folder, header):
    """Write a header with the digest that belongs to it."""
    header.pop("sha256", None)
    canonical = json.dumps(header, sort_keys=True, separators=(",", ":"))
    header["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    (folder / SETTINGS_FILE).write_text(json.dumps(header))


def resealed(folder, tensors=None, **settings):
    """A folder whose hashes are right although its contents make no sense."""
    header = json.loads((folder / SETTINGS_FILE).read_text())
    if tensors is not None:
        save_file(tensors, folder / TENSORS_FILE)
        blob = (folder / TENSORS_FILE).read_bytes()
        header["tensors_sha256"] = hashlib.sha256(blob).hexdigest()
    for name, value in settings.items():
        part, _, field = name.partition("__")
        if field:
            header["settings"][part][field] = value
        else:
            header["settings"][name] = value
    seal(folder, header)


VERSION_2 = {
    "hook_point": HOOK_POINT,
    "uncounted_ids": [0, 1, 2],
    "pad_id": 0,
    "threshold": 0.25,
    "clamp_value": -20.0,
    "clamp_scope": "all",
    "clamp_unit": "activation",
    "residual_norm": 3.1,
    "gate": "density",
    "window_size": None,
    "leak": None,
    "edit": "clamp",
    "trigger_limit": 0.5,
    "encoder": {"kind": "slice", "normalization": "none"},
    "model": None,
    "facts": {"x": 1},
}
SHARED = {"residual_norm": 3.1, "trigger_limit": 0.5}


def in_version_2(folder, **changes):
    """A guard as it was written when gate and edit were names beside their numbers."""
    folder.mkdir()
    save_file(slice_features(jumprelu_sae(), FEATURES).state_dict(), folder / TENSORS_FILE)
    header = {
        "format": "dynamic-sae-guardrails",
        "format_version": 2,
        "tensors_sha256": hashlib.sha256((folder / TENSORS_FILE).read_bytes()).hexdigest(),
        "settings": {**VERSION_2, **changes},
    }
    seal(folder, header)
    return folder


@pytest.mark.parametrize(
    ("changes", "gate", "edit"),
    [
        ({}, DensityGate(0.25), Clamp(-20.0, **SHARED)),
        (
            {"gate": "window", "window_size": 3, "clamp_scope": "active"},
            WindowGate(0.25, 3),
            Clamp(-20.0, "active", **SHARED),
        ),
        (
            {"gate": "cusum", "leak": 0.25, "threshold": 2.0, "clamp_unit": "residual_norm"},
            CusumGate(2.0, 0.25),
            Clamp(-20.0, unit="residual_norm", **SHARED),
        ),
        ({"gate": "token", "edit": "refusal"}, OpenGate(), Refusal(-20.0, **SHARED)),
    ],
)
def test_version_2_still_loads_and_is_saved_anew(tmp_path, changes, gate, edit):
    loaded = Guard.load(in_version_2(tmp_path / "old", **changes))
    assert (loaded.gate, loaded.edit) == (gate, edit)
    assert (loaded.hook_point, loaded.uncounted_ids, loaded.pad_id) == (HOOK_POINT, [0, 1, 2], 0)
    assert loaded.facts == {"x": 1}
    made = make_guard(jumprelu_sae(), gate=gate, edit=edit)
    model, ids = tiny_model(), random_ids(3, 6)
    outputs = []
    loaded.save(tmp_path / "new")
    assert json.loads((tmp_path / "new" / SETTINGS_FILE).read_text())["format_version"] == 3
    for guard in (made, loaded, Guard.load(tmp_path / "new")):
        with guard.attached(model):
            outputs.append(model(ids).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "windw"}, "`gate` must be one of"),
        ({"gate": "window"}, "`size` must be at least 1, got None"),
        ({"threshold": 1.5}, "`threshold` must be a density"),
        ({"clamp_value": "-500.0"}, "`value` must be a finite number, got '-500.0'"),
        ({"edit": None}, "`edit` must be one of"),
    ],
)
def test_version_2_is_checked_too(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        Guard.load(in_version_2(tmp_path / "old", **changes))


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
    _, folder = saved
    resealed(folder, gate__threshold=2.0)
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
        ("edit__value", "-500.0"),
        ("edit__value", None),
        ("edit__value", [1.0]),
        ("edit__value", True),
        ("gate__threshold", "0.5"),
        ("gate__threshold", None),
        ("edit__residual_norm", "3"),
        ("edit__trigger_limit", {}),
        ("hook_point", 3),
        ("uncounted_ids", "abc"),
        ("uncounted_ids", [0.5]),
        ("uncounted_ids", 7),
        ("pad_id", "0"),
        ("gate", 1),
        ("gate", {"kind": []}),
        ("gate", {"kind": "window", "threshold": 0.5}),
        ("gate", {"kind": "window", "threshold": 0.5, "size": "8"}),
        ("gate", {"kind": "cusum", "threshold": 0.5, "leak": [0.1]}),
        ("gate", {"kind": "token", "threshold": 0.5}),
        ("edit", {"kind": "clamp", "value": -1.0, "strength": 2}),
        ("facts", [1]),
        ("model", {"name": "x"}),
        ("model", [1]),
        ("encoder", []),
        ("encoder", {"kind": "slice", "normalization": 1}),
    ],
)
def test_settings_of_another_kind_are_refused_by_name(saved, name, value):
    _, folder = saved
    resealed(folder, **{name: value})
    wanted = {
        "encoder": "fit its encoder|`normalization` must be one of",
        "gate": "`(gate|size|leak)` must",
    }.get(name, f"`{name.rpartition('__')[2]}` must")
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
