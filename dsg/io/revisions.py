"""Which commit of the hub a model comes from; Transformers does not tell."""

import re
from pathlib import Path
from typing import Any

from dsg.io.hub import looks_local, parse_name

_COMMIT = re.compile(r"[0-9a-f]{40}")


def model_revision(model_name: str) -> str | None:
    """The commit of a model that was just loaded, or of the hub's copy in a folder.

    Args:
        model_name: Folder or hub name, perhaps with `@revision`.

    Returns:
        None for a folder that is no snapshot of the hub's cache.
    """
    name, revision = parse_name(model_name)
    if looks_local(name):
        return snapshot_commit(name)
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import try_to_load_from_cache

    # The cache knows which commit a branch or tag was when it was last asked for.
    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return snapshot_commit(file) if isinstance(file, str) else None


def snapshot_commit(path: str | Path) -> str | None:
    """The commit in a path of the hub's cache, `models--org--name/snapshots/<commit>/...`."""
    parts = Path(path).parts
    for repository, folder, commit in zip(parts, parts[1:], parts[2:], strict=False):
        if folder == "snapshots" and repository.startswith("models--"):
            return commit if _COMMIT.fullmatch(commit) else None
    return None


def note_revision(config: Any, model_name: str) -> None:
    """Keep a model's commit where Transformers used to; it is never saved with the model.

    Args:
        config: The configuration that was loaded.
        model_name: As for `model_revision`.
    """
    config._commit_hash = model_revision(model_name)


def noted_revision(config: Any) -> str | None:
    """The commit that `note_revision` kept, or that of the snapshot a model was loaded from."""
    noted = getattr(config, "_commit_hash", None)
    return noted or snapshot_commit(getattr(config, "name_or_path", None) or "")
