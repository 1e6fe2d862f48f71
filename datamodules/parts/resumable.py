"""A data loader that goes on in the middle of an epoch."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from dsg.errors import UserError


class ResumableLoader(DataLoader):
    """A `DataLoader` whose place in the epoch is saved in checkpoints.

    Lightning saves and restores what has `state_dict` and `load_state_dict`; of any other loader a
    resumed run would see an epoch's first batches twice. The order of the batches must not change
    between epochs or runs. No batch may be fetched ahead, so there are no workers.

    Args:
        dataset: As for `DataLoader`.
        options: Likewise.
    """

    def __init__(self, dataset: Any, **options: Any) -> None:
        # Of its own, because a loader draws a number whenever it begins: the global generator must
        # be left alone for a resumed run to draw what the interrupted one would have drawn.
        super().__init__(dataset, num_workers=0, generator=torch.Generator(), **options)
        self._num_yielded = 0
        self._num_skipped = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skip, self._num_skipped = self._num_skipped, 0
        self._num_yielded = skip
        for batch in itertools.islice(super().__iter__(), skip, None):
            self._num_yielded += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Batches of this epoch that were yielded, and those of a whole one."""
        # After the last batch the next one is the first.
        return {"num_yielded": self._num_yielded % max(len(self), 1), "num_batches": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next epoch after the batches that were yielded already.

        Raises:
            UserError: The state is that of other data.
        """
        if state["num_batches"] != len(self):
            raise UserError(
                f"the checkpoint must be of a run with {len(self)} training batches, got "
                f"{state['num_batches']}; give the same data, batch size and number of devices, or "
                "start again with --overwrite."
            )
        self._num_skipped = self._num_yielded = state["num_yielded"]
