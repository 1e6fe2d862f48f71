"""Folders that are expensive to make and cheap to check, under the user's cache directory."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from dsg.errors import UserError

_MANIFEST = "manifest.json"
_DRAFT = ".{}.draft"
_log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """`$DSG_CACHE`, else `$XDG_CACHE_HOME/dsg`, else `~/.cache/dsg`."""
    if own := os.environ.get("DSG_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsg"


def content_key(configuration: object, sources: list[Path]) -> str:
    """16 hex digits that change with the configuration or with any source file's text.

    Args:
        configuration: Anything JSON can hold.
        sources: Files whose code decides the content.
    """
    digest = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, made by `build` unless a sound one is there.

    Only one process builds; the others wait for it. A folder appears whole or not at all, and one
    whose files do not match their recorded SHA-256 is built again.

    Args:
        name: Folder name; must determine the content.
        build: Fills the empty folder that it is given.

    Raises:
        UserError: If the cache directory cannot be written.
    """
    root = cache_directory()
    lock = FileLock(root / f"{name}.lock")
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"The cache directory {root} cannot be written ({error.strerror}); "
            "set DSG_CACHE to a directory that can."
        ) from error
    try:
        folder = root / name
        if folder.exists() or folder.is_symlink():
            if _is_sound(folder):
                return folder
            _log.warning("%s is damaged and is built again.", folder)
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder)
            else:
                folder.unlink()
        _remove_dead_drafts(root, name)
        draft = root / _DRAFT.format(name)
        try:
            draft.mkdir()
            build(draft)
            (draft / _MANIFEST).write_text(json.dumps(_digests(draft), indent=1))
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    finally:
        lock.release()
    return folder


def _remove_dead_drafts(root: Path, own: str) -> None:
    """Remove what killed builds left: a draft belongs to a live one only while its lock is held.

    Args:
        root: The cache directory.
        own: Name whose lock this process holds.
    """
    before, after = _DRAFT.split("{}")
    for draft in root.glob(_DRAFT.format("*")):
        name = draft.name.removeprefix(before).removesuffix(after)
        if name == own:
            shutil.rmtree(draft)
            continue
        try:
            with FileLock(root / f"{name}.lock").acquire(blocking=False):
                shutil.rmtree(draft, ignore_errors=True)
        except Timeout:
            continue


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _MANIFEST
    }


def _is_sound(folder: Path) -> bool:
    try:
        return json.loads((folder / _MANIFEST).read_text()) == _digests(folder)
    except (OSError, ValueError):
        return False
