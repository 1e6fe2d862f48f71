"""Files appear whole or not at all."""

import errno
import os

import pytest

from dsg.io.atomic import remove_drafts, whole_file, write_atomically


def test_a_whole_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "folder" / "weights"
    for content in (b"old", b"new"):
        with whole_file(path) as file:
            file.write(content)
        assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["weights"]


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "weights"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(OSError, match="No space left"), whole_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["weights"]


def test_it_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    steps = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: steps.append(n) or r(*a))
    with whole_file(tmp_path / "weights") as file:
        file.write(b"new")
    assert steps[:2] == ["fsync", "replace"]


def test_drafts_of_dead_processes_are_removed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".a.ckpt.part").touch()
    (tmp_path / "checkpoints" / "a.ckpt").touch()
    remove_drafts(tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["a.ckpt"]


def test_text_is_written_through_a_neighbour(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "results.jsonl", "old")
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.jsonl"]
