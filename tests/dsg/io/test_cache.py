"""A cached folder appears whole, is reused, and is rebuilt when damaged."""

import threading
from pathlib import Path

import pytest

from dsg.errors import UserError
from dsg.io.cache import cache_directory, cached_folder, content_key


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSG_CACHE", str(tmp_path / "cache"))


class Builder:
    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, folder: Path) -> None:
        self.runs += 1
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_bytes(b"weights")


def test_built_once_and_reused() -> None:
    build = Builder()
    first = cached_folder("thing", build)
    assert cached_folder("thing", build) == first
    assert build.runs == 1
    assert (first / "inner" / "weights").read_bytes() == b"weights"


@pytest.mark.parametrize("damage", ["change", "remove", "add", "manifest"])
def test_a_damaged_folder_is_rebuilt(damage: str) -> None:
    build = Builder()
    folder = cached_folder("thing", build)
    weights = folder / "inner" / "weights"
    if damage == "change":
        weights.write_bytes(b"weightz")
    elif damage == "remove":
        weights.unlink()
    elif damage == "add":
        (folder / "stray").write_text("x")
    else:
        (folder / "manifest.json").write_text("{")
    assert cached_folder("thing", build) == folder
    assert build.runs == 2
    assert weights.read_bytes() == b"weights"
    assert not (folder / "stray").exists()


def test_an_interrupted_build_leaves_nothing() -> None:
    def fails(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder("thing", fails)
    assert [path.name for path in cache_directory().iterdir() if path.is_dir()] == []
    build = Builder()
    cached_folder("thing", build)
    assert build.runs == 1


def test_drafts_of_killed_builds_are_removed_but_not_those_of_live_ones() -> None:
    root = cache_directory()

    def build_while_others_build(folder: Path) -> None:
        (folder / "half").write_text("half")
        for name in ("dead", "dead-longer"):
            (root / f".{name}.draft" / "inner").mkdir(parents=True)
        cached_folder("other", Builder())
        assert (folder / "half").is_file()

    cached_folder("live", build_while_others_build)
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["live", "other"]


def test_a_draft_of_the_same_name_is_begun_afresh() -> None:
    (cache_directory() / ".thing.draft").mkdir(parents=True)
    (cache_directory() / ".thing.draft" / "stray").touch()
    assert not (cached_folder("thing", Builder()) / "stray").exists()


def test_concurrent_callers_build_once() -> None:
    build = Builder()
    threads = [threading.Thread(target=cached_folder, args=("thing", build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.runs == 1


def test_the_key_follows_configuration_and_code(tmp_path: Path) -> None:
    source = tmp_path / "code.py"
    source.write_text("a = 1")
    key = content_key({"seed": 0}, [source])
    assert key == content_key({"seed": 0}, [source])
    assert key != content_key({"seed": 1}, [source])
    source.write_text("a = 2")
    assert key != content_key({"seed": 0}, [source])


def test_an_unwritable_cache_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("DSG_CACHE", str(blocked))
    with pytest.raises(UserError, match=r"cannot be written .* set DSG_CACHE"):
        cached_folder("thing", Builder())


def test_an_entry_that_is_no_folder_is_built_again() -> None:
    build = Builder()
    cache_directory().mkdir(parents=True)
    (cache_directory() / "file").write_text("no folder")
    (cache_directory() / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        assert (cached_folder(name, build) / "inner" / "weights").is_file()
