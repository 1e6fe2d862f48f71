"""Folders that are expensive to make and cheap to check, under the user's cache directory."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from dsg.errors import UserError

_MANIFEST = "manifest.json"
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
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = tempfile.TemporaryDirectory(dir=root)
        probe.cleanup()
    except OSError as error:
        raise UserError(
            f"The cache directory {root} cannot be written ({error.strerror}); "
            "set DSG_CACHE to a directory that can."
        ) from error
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if folder.exists():
            if _is_sound(folder):
                return folder
            _log.warning("%s is damaged and is built again.", folder)
            shutil.rmtree(folder)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as draft:
            inner = Path(draft) / name
            inner.mkdir()
            build(inner)
            (inner / _MANIFEST).write_text(json.dumps(_digests(inner), indent=1))
            inner.rename(folder)
    return folder


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
