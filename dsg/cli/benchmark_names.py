"""Names in configurations that stand for folders of the embedded benchmark."""

import re
from collections.abc import Callable
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.utilities.seed import isolate_rng

from dsg.errors import UserError


def resolve_benchmark(value: str) -> str:
    """Replace `tiny_world:SEED/model` or `tiny_world:SEED/sae` by the folder that holds it.

    The embedded benchmark is trained if the cache does not hold it yet.

    Raises:
        UserError: The value begins like one of the two but is neither.
    """
    if not value.startswith("tiny_world:"):
        return value
    match = re.fullmatch(r"tiny_world:(\d+)/(model|sae)", value)
    if match is None:
        raise UserError(
            f"The embedded benchmark is named tiny_world:SEED/model or tiny_world:SEED/sae, "
            f"got {value!r}; mend the configuration."
        )
    from dsg.cli.tiny_world import ensure_tiny_world

    # Training it draws random numbers; a run must not depend on whether the cache was warm.
    with isolate_rng():
        return str(ensure_tiny_world(int(match[1])) / match[2])


def map_strings(value: Any, replace: Callable[[str], str]) -> Any:
    """Apply `replace` to every string of a nested configuration, in place where possible."""
    if isinstance(value, str):
        return replace(value)
    if isinstance(value, list):
        return [map_strings(item, replace) for item in value]
    if isinstance(value, dict):
        return {name: map_strings(item, replace) for name, item in value.items()}
    if isinstance(value, Namespace):
        for name, item in vars(value).items():
            setattr(value, name, map_strings(item, replace))
    return value
