"""Names on the Hugging Face hub, data sets from it or from disk, and what to do if it refuses.

Also which commit of the hub a model comes from; Transformers does not tell.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from dsg.errors import UserError, chain
from dsg.io.reading import check_file
from dsg.io.rows import ROW_FILES, read_rows

Kind = Literal["data set", "model", "SAE"]


def parse_name(name: str) -> tuple[str, str | None]:
    """Take `org/name@revision` apart.

    Args:
        name: Hub name, with or without a branch, tag or commit; or a path, whose `@` stay.

    Returns:
        The name, and the revision if there is one.

    Raises:
        UserError: Name or revision is empty.
    """
    if "@" not in name or Path(name).exists():
        return name, None
    bare, _, revision = name.rpartition("@")
    if not bare or not revision:
        raise UserError(
            f"a hub name with a revision must read org/name@revision, got {name!r}; complete it."
        )
    return bare, revision


def load_rows(dataset: str, config: str | None, split: str) -> list[dict[str, Any]]:
    """The rows of one split of a data set.

    Args:
        dataset: Hub name, `@revision` pins it; a folder in the hub's layout (a dataset card with
            its configurations, and Parquet files), which has no revisions and comes before a hub
            name that reads the same; or a JSONL, JSON, CSV or Parquet file.
        config: Configuration of the data set; None where it has only one. Ignored for a file.
        split: Such as `test`, `test[:100]` or `train+test`. Ignored for a file.

    Raises:
        UserError: There is no such data set, configuration or split, it may not be read, or a line
            of a file is broken.
    """
    check_dataset(dataset)
    path = Path(dataset)
    if path.is_file() or path.suffix.lower() in ROW_FILES:
        return read_rows(path)
    with _built(dataset, config) as builder:
        try:
            return builder.as_dataset(split=split).to_list()
        except ValueError:
            raise UserError(
                f"`split` of {dataset!r} must be one of {sorted(builder.info.splits)}, got "
                f"{split!r}; choose one."
            ) from None


def check_dataset(dataset: str) -> None:
    """Refuses a path that leads to nothing which could be read; hub names are not looked up.

    Raises:
        UserError: It is one.
    """
    name, _ = parse_name(dataset)
    path = Path(name)
    if path.is_file() or path.suffix.lower() in ROW_FILES:
        check_file(path)
    elif looks_local(name) and not path.is_dir():
        raise UserError(
            f"the data set {name!r} must be a hub name, a folder in the hub's layout, or a file "
            f"({', '.join(ROW_FILES)}), got neither; check the path."
        )


def dataset_revision(dataset: str, config: str | None) -> str | None:
    """The commit of a hub data set that `load_rows` reads; None for folders and files.

    Raises:
        UserError: As for `load_rows`.
    """
    name, _ = parse_name(dataset)
    if Path(name).exists() or Path(name).suffix.lower() in ROW_FILES:
        return None
    with _built(dataset, config) as builder:
        return builder.hash


def short_name(name: str) -> str:
    """How results call a model or data set: without its revision, or a file's or folder's place."""
    bare, _ = parse_name(name)
    return Path(bare).name if Path(bare).exists() else bare


def looks_local(name: str) -> bool:
    """Whether a name can only be a path: it exists, or the hub allows no such name."""
    odd = name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
    return odd or Path(name).exists()


def hub_error(argument: str, kind: Kind, name: str, error: BaseException) -> UserError:
    """What a refusal of the hub means and how to mend it, in one sentence.

    Args:
        argument: Where the user gave the name.
        kind: What the repository holds.
        name: Hub name, perhaps with a revision.
        error: What the library raised; no token in it is repeated.
    """
    repository, revision = parse_name(name)
    page = f"https://huggingface.co/{'datasets/' if kind == 'data set' else ''}{repository}"
    reason = _meaning(error, revision) or first_line(error)
    return UserError(
        f"`{argument}` names the {kind} {repository!r} of the Hugging Face hub, which cannot be "
        f"read ({reason}); check the name, accept its licence at {page} if it asks for that, set "
        "HF_TOKEN to a token of that account, or give a local copy."
    )


def load_pretrained(
    load: Callable[..., Any],
    model_name: str,
    wanted: str = "",
    given: str | None = None,
    **options: Any,
) -> Any:
    """Call a `from_pretrained` of Transformers, at the revision that a name asks for.

    Args:
        load: The method.
        model_name: Folder or hub name, perhaps with `@revision`.
        wanted: What the folder or repository must hold, for the message, such as ` with a
            tokenizer`.
        given: The name that the user gave, where it led to this one.
        options: Passed on; remote code is never run.

    Raises:
        UserError: There is no such thing, or the hub refuses it.
    """
    name, revision = parse_name(model_name)
    check_folder("model_name", name, wanted)
    try:
        return load(name, revision=revision or "main", trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        if not looks_local(name):
            raise hub_error("model_name", "model", model_name, error) from error
        raise no_model(given or model_name, error, wanted) from error


def check_folder(argument: str, name: str, wanted: str = "") -> None:
    """Refuses a path that is no folder where a folder or a hub name is wanted.

    Raises:
        UserError: It is one.
    """
    if looks_local(name) and not Path(name).is_dir():
        actual = "a file" if Path(name).exists() else "no such folder"
        raise UserError(
            f"`{argument}` must be a Hugging Face folder or hub name{wanted}, got {name!r} "
            f"({actual}); check the spelling and that you may read it."
        )


def no_model(model_name: str, error: BaseException, wanted: str = "") -> UserError:
    """Why a folder is no model, or holds no tokenizer and the like, in one sentence."""
    return UserError(
        f"`model_name` must be a Hugging Face folder or hub name{wanted}, got {model_name!r} "
        f"({first_line(error)}); check the spelling and that you may read it."
    )


def is_refusal(error: BaseException) -> bool:
    """Whether it was the hub that refused, or could not be asked."""
    return _meaning(error, None) is not None


def _meaning(error: BaseException, revision: str | None) -> str | None:
    said = " ".join(f"{type(each).__name__}: {each}" for each in chain(error))
    meanings = {
        ("GatedRepoError", "gated repo", "gated dataset"): "it is gated",
        ("OfflineMode", "offline mode", "HF_HUB_OFFLINE"): (
            "HF_HUB_OFFLINE is set and the cache has no such copy"
        ),
        ("RevisionNotFound", "not a valid git identifier"): f"it has no revision {revision!r}",
        ("RepositoryNotFound", "DatasetNotFound", "not a valid model identifier"): (
            "there is none of that name, or it is private"
        ),
        ("Couldn't reach", "couldn't connect", "ConnectError", "ConnectTimeout"): (
            "the hub cannot be reached and the cache has no such copy"
        ),
    }
    for signs, meaning in meanings.items():
        if any(sign in said for sign in signs):
            return meaning
    return None


def first_line(error: BaseException) -> str:
    """What an exception says, in one line and without the user's token."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    from huggingface_hub import get_token

    token = get_token()
    return line.replace(token, "...") if token else line


@contextlib.contextmanager
def _built(dataset: str, config: str | None) -> Iterator[Any]:
    """The builder of a data set, which has read its files."""
    # Here, because importing it takes a second and most runs need none of it.
    import datasets

    name, revision = parse_name(dataset)
    with contextlib.ExitStack() as stack:
        cache, is_folder = None, Path(name).is_dir()
        if is_folder:
            # What is at hand needs no second copy in the user's cache.
            cache = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(_without_bars(datasets))
        try:
            builder = datasets.load_dataset_builder(
                name, config, revision=None if is_folder else revision, cache_dir=cache
            )
            if not is_folder:
                _check_revision(name, builder.hash, revision)
            builder.download_and_prepare()
        # Missing files, gated repositories and lost networks all arrive as other types.
        except Exception as error:
            raise _unbuilt(datasets, dataset, config, error) from error
        yield builder


@contextlib.contextmanager
def _without_bars(datasets: Any) -> Iterator[None]:
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _check_revision(name: str, commit: str | None, revision: str | None) -> None:
    """Without the hub, `datasets` takes any copy of its cache, whatever revision was asked for."""
    if revision is None or commit is None or commit.startswith(revision):
        return
    from huggingface_hub.constants import HF_HUB_CACHE

    repository = f"datasets--{name.replace('/', '--')}"
    pointer = Path(HF_HUB_CACHE) / repository / "refs" / revision
    if not pointer.is_file() or pointer.read_text(encoding="utf-8").strip() != commit:
        raise ConnectionError("the copy in the cache is another revision")


def _unbuilt(datasets: Any, dataset: str, config: str | None, error: Exception) -> UserError:
    name, revision = parse_name(dataset)
    if isinstance(error, ValueError):
        with contextlib.suppress(Exception):
            names = datasets.get_dataset_config_names(name, revision=revision)
            if config not in names:
                return UserError(
                    f"`config` of {dataset!r} must be one of {names}, got {config!r}; choose one."
                )
    if Path(name).is_dir():
        return UserError(
            f"the folder {name!r} must be a data set in the hub's layout (a README.md whose head "
            f"lists its configurations, and Parquet files), got an error ({first_line(error)}); "
            "mend it."
        )
    return hub_error("dataset", "data set", dataset, error)


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
