"""Finds out whether an error is that of a full disk, whoever noticed it."""

import errno
import os
import re

from dsg.errors import chain

# The disk, the user's share of it, or what a process may write at most.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors reports in words, and so does torch's writer of archives.
_IN_WORDS = re.compile(rf"os error ({'|'.join(map(str, _FULL))})\b")


def disk_full_behind(error: BaseException) -> str | None:
    """What a full disk did not let be written, in a sentence; None for any other error."""
    for seen in chain(error):
        if isinstance(seen, OSError) and seen.errno in _FULL:
            place = f" {os.fspath(seen.filename)!r}" if isinstance(seen.filename, str) else ""
            return f"no space is left to write{place} ({os.strerror(seen.errno)})"
        found = _IN_WORDS.search(str(seen))
        if found is not None:
            return f"no space is left to write ({os.strerror(int(found[1]))})"
    return None
