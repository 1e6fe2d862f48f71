"""The directory of one run, claimed before anything is computed, and the checkpoints in it.

Every run owns one directory and puts a marker into it. Only a marked directory is ever replaced or
resumed, so a mistyped `--run_dir` cannot cost the user other files.
"""

import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dsg.errors import UserError

MARKER = ".dsg-run"
LOCK = ".dsg-lock"


def is_rank_zero() -> bool:
    """Whether this process is the only one, or the first of a distributed run.

    Read from the environment, because it must be known before any process group exists: launchers
    set `RANK`, or `LOCAL_RANK` beside `NODE_RANK`; Slurm sets `SLURM_PROCID`.

    Raises:
        UserError: What is set is no number.
    """
    for names in (("RANK",), ("LOCAL_RANK", "NODE_RANK"), ("SLURM_PROCID",)):
        if names[0] in os.environ:
            return all(_rank(name) == 0 for name in names)
    return True


def check_ranks() -> None:
    """Refuses a rank that is no number: libraries read it as they are imported, and break.

    Raises:
        UserError: The environment holds one.
    """
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        _rank(name)


def _rank(name: str) -> int:
    value = os.environ.get(name, "0")
    if not value.isdecimal():
        raise UserError(
            f"the environment variable {name} must be the number of a rank, got {value!r}; unset "
            "it, or let the launcher set it."
        )
    return int(value)


@contextmanager
def run_directory(
    path: str | Path, *, overwrite: bool = False, resume: bool = False
) -> Iterator[Path]:
    """Claim the directory of a run for the length of a `with` block.

    Nobody else can claim it meanwhile; the operating system ends the claim of a process that dies.
    A `UserError` inside the block undoes everything: what was written is removed and a directory
    that was being overwritten comes back. Any other end, an interrupt included, keeps what was
    written. Ranks other than zero touch nothing and get the same path.

    Args:
        path: The directory; parents are made as needed.
        overwrite: Replace an earlier run in this directory.
        resume: Keep an earlier run in this directory and continue it.

    Yields:
        The directory.

    Raises:
        UserError: The directory holds files and neither option was given, is not a run directory
            although one was, belongs to a run that still goes on, or cannot be written.
    """
    directory = Path(path).expanduser()
    _check_name(directory)
    if directory.is_symlink():
        directory = directory.resolve()  # the link stays, what it points to is the run's
    if not is_rank_zero():
        yield directory
        return
    if overwrite and resume:
        raise UserError("Give either --overwrite or --resume, got both; choose one.")
    with ExitStack() as locks:
        if resume:
            _check_resumable(directory)
            locks.enter_context(_locked(directory))
            _write_marker(directory)
            yield directory
            return
        if (directory / MARKER).is_file():
            locks.enter_context(_locked(directory))
        replaced = _set_aside(directory, overwrite)
        made = _make(directory)
        try:
            locks.enter_context(_locked(directory))
            yield directory
        except UserError:
            _remove_contents(directory)
            for folder in made:
                with suppress(OSError):  # someone else may have put a run into a shared parent
                    folder.rmdir()
            if replaced is not None:
                replaced.rename(directory.resolve())
            raise
        except BaseException:
            _remove(replaced)
            raise
        _remove(replaced)


def _check_name(directory: Path) -> None:
    """Refuses what the system takes for no path at all, such as a name that is too long."""
    try:
        directory.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise _unwritable(directory, error) from None


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a run directory, whose file says who holds it."""
    path = directory / LOCK
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        owner = path.read_text(encoding="utf-8").strip() or "another process"
        raise UserError(
            f"run_dir {str(directory)!r} belongs to a run that still goes on ({owner}); wait for "
            f"its end, stop it, or name another --run_dir."
        ) from None
    except OSError as error:
        raise _unwritable(directory, error) from None
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def _check_resumable(directory: Path) -> None:
    if not (directory / MARKER).is_file():
        raise UserError(
            f"--resume needs the directory of an earlier run, got run_dir {str(directory)!r} which "
            f"is none; leave --resume out or name another --run_dir."
        )


def _set_aside(directory: Path, overwrite: bool) -> Path | None:
    """Move the run that is to be overwritten out of the way; return where it lies."""
    if not directory.exists():
        return None
    if not directory.is_dir():
        raise UserError(
            f"run_dir must be a directory, got the file {str(directory)!r}; name another --run_dir."
        )
    if not any(directory.iterdir()):
        return None
    if not overwrite:
        raise UserError(
            f"run_dir {str(directory)!r} already holds files; add --overwrite to replace that run, "
            f"--resume to continue it, or name another --run_dir."
        )
    if not (directory / MARKER).is_file():
        raise UserError(
            f"--overwrite replaces earlier runs only, and run_dir {str(directory)!r} was not "
            f"written by dsg (it has no {MARKER}); name another --run_dir."
        )
    real = directory.resolve()
    if Path.cwd().is_relative_to(real):
        raise UserError(
            f"--overwrite cannot replace run_dir {str(directory)!r} from inside it; "
            f"change to another working directory."
        )
    replaced = real.with_name(f".{real.name}.replaced")
    try:
        _remove(replaced)  # left by a run that was killed outright
        return real.rename(replaced)
    except OSError as error:
        raise _unwritable(directory, error) from None


def _make(directory: Path) -> list[Path]:
    """Make and mark the directory; return the folders that are new, innermost first."""
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(directory, error) from None
    _write_marker(directory)
    return made


def _write_marker(directory: Path) -> None:
    try:
        (directory / MARKER).write_text("This directory belongs to one run of dsg.\n")
    except OSError as error:
        raise _unwritable(directory, error) from None


def _unwritable(directory: Path, error: OSError) -> UserError:
    return UserError(
        f"run_dir {str(directory)!r} cannot be written ({error.strerror}); "
        f"name a writable one with --run_dir."
    )


def _remove_contents(directory: Path) -> None:
    for child in directory.iterdir():
        _remove(child)


def _remove(path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# What every checkpoint of a Lightning `fit` run holds.
_PARTS = ("state_dict", "loops", "global_step")
_log = logging.getLogger(__name__)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's contents, its tensors only when they are used; no code in it is run.

    Raises:
        UserError: There is no file, or it is no whole checkpoint of a run.
    """
    import torch  # here, because a run directory is claimed without torch

    if not path.is_file():
        raise UserError(
            f"the checkpoint must be a file, got {str(path)!r} which is none; mend --ckpt_path."
        )
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # broken bytes break the reader in any way
        raise UserError(
            f"the checkpoint {str(path)!r} cannot be read ({_reason(path, error)}); give another "
            "with --ckpt_path or start again with --overwrite."
        ) from None
    if not isinstance(content, dict) or not all(part in content for part in _PARTS):
        raise UserError(
            f"the checkpoint {str(path)!r} must hold a training run's state "
            f"({', '.join(_PARTS)}), got something else; give another with --ckpt_path or start "
            "again with --overwrite."
        )
    return content


def newest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of a run that was written last; None if the run has none.

    One that cannot be read, as a full disk leaves it, is passed over with a line in the log.
    """
    files = directory.rglob("checkpoints/*.ckpt")
    for path in sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True):
        try:
            read_checkpoint(path)
        except UserError as error:
            _log.warning("Passed over: %s", str(error).split(";")[0])
        else:
            return path
    return None


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "it may not be read"
    if path.stat().st_size == 0:
        return "it is empty"
    if "Unsupported" in str(error) or "weights_only" in str(error).lower():
        return "it holds other things than tensors and plain values"
    return "it is cut short or damaged"
