"""A data module as a run's module would find it, without the run."""

from types import SimpleNamespace
from typing import Any


def read_by(data: Any, reads: str, world_size: int = 1, rank: int = 0) -> Any:
    """Attach a trainer whose module reads `evaluate`, `unlearn`, ... from the data."""
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        current_epoch=0,
        lightning_module=SimpleNamespace(reads=reads, keeps_rest=False),
    )
    return data
