"""A run goes on from its newest checkpoint that can be read."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from dsg.errors import UserError
from dsg.io.run_directory import newest_checkpoint, read_checkpoint

CONTENT = {"state_dict": {"w": torch.arange(1000.0)}, "loops": {}, "global_step": 3}


def save(path: Path, content: object = CONTENT, age: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_the_newest_one_by_its_time(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for age, name in enumerate(["epoch=9", "epoch=10", "last"]):
        save(tmp_path / "a" / "checkpoints" / f"{name}.ckpt", age=age)
    assert newest_checkpoint(tmp_path) == tmp_path / "a" / "checkpoints" / "epoch=9.ckpt"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("no checkpoint")


def foreign_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")


def other_tensors(path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, path)


def a_list(path: Path) -> None:
    torch.save([1, 2], path)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({**CONTENT, "extra": Path("x")}))


def pickled_object(path: Path) -> None:
    torch.save({**CONTENT, "extra": zipfile.ZipInfo("x")}, path)


DAMAGE = {
    cut: "cut short or damaged",
    empty: "it is empty",
    text: "cannot be read",
    foreign_archive: "cut short or damaged",
    other_tensors: "must hold a training run's state",
    a_list: "must hold a training run's state",
    pickled: "cannot be read",
    pickled_object: "other things than tensors and plain values",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_unreadable_one_is_passed_over_with_a_line(tmp_path, caplog, damage):
    older = save(tmp_path / "checkpoints" / "older.ckpt", age=9)
    newer = save(tmp_path / "checkpoints" / "newer.ckpt")
    damage(newer)
    assert newest_checkpoint(tmp_path) == older
    [line] = caplog.messages
    assert line.startswith("Passed over: the checkpoint ")
    assert "newer.ckpt" in line
    with pytest.raises(UserError, match=DAMAGE[damage]):
        read_checkpoint(newer)


def test_a_missing_one_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"must be a file, got .*gone\.ckpt"):
        read_checkpoint(tmp_path / "gone.ckpt")


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    path = tmp_path / "evil.ckpt"
    torch.save({**CONTENT, "extra": Evil()}, path)
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(path)
    assert not (tmp_path / "evil").exists()
