"""A bar for what takes long, on terminals only."""

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")


def with_bar(items: Sequence[_Item], name: str, *, show: bool) -> Iterable[_Item]:
    """The items, with a bar on stderr that vanishes at the end.

    Args:
        items: What is gone through.
        name: What the bar says.
        show: False for no bar; there is none either where stderr is no terminal.
    """
    if not (show and items and sys.stderr.isatty()):
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, name, console=Console(stderr=True), transient=True)
