"""Checkpoints on disk: whether one can be read, and which one a run goes on from."""

import logging
from pathlib import Path
from typing import Any

from dsg.errors import UserError

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
    found = directory.rglob("checkpoints/*.ckpt")
    for path in sorted(found, key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True):
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
