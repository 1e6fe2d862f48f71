"""Whole batches, formed before they are dealt to ranks, and a loader that goes on in an epoch."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from dsg.errors import UserError


def batch_loader(
    dataset: Sequence[Any],
    batches: Sequence[Sequence[int]],
    trainer: Any,
    collate: Callable[[Any], Any],
    *,
    keep_rest: bool,
) -> DataLoader:
    """Deal whole batches to the ranks of a trainer, equally many steps to each.

    Args:
        dataset: The items.
        batches: Indices of the items of each batch.
        trainer: Supplies rank and number of ranks; None stands for a single process.
        collate: Makes a batch of a list of items.
        keep_rest: Some ranks get an empty last step, a batch that is None, rather than that the
            batches which do not go round are left out. For everything but gradient steps.
    """
    rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
    sampler = GlobalBatches(batches, rank, world_size, keep_rest=keep_rest)
    return ResumableLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=lambda items: collate(items) if items else None,
    )


class GlobalBatches(Sampler[list[int]]):
    """A batch sampler over batches that were formed before anybody asked for ranks.

    Rank r takes the batches r, r + world_size, ...: none is repeated, padded or split. Every rank
    gets equally many, because Lightning synchronises each step. Use it with
    `Trainer(use_distributed_sampler=False)`.

    Args:
        batches: Sample indices of each batch.
        rank: This process, in `[0, world_size)`.
        world_size: Number of processes.
        keep_rest: What to do with the batches that do not go round: True deals them too, and empty
            ones to the ranks that are left; False, for steps with gradients, leaves them out.

    Raises:
        UserError: `rank` or `world_size` is out of range.
    """

    def __init__(
        self, batches: Sequence[Sequence[int]], rank: int, world_size: int, *, keep_rest: bool
    ) -> None:
        if not 0 <= rank < world_size:
            raise UserError(
                f"`rank` must lie in [0, world_size), got rank {rank} of {world_size}; take both "
                "from the trainer (global_rank, world_size)."
            )
        rest = len(batches) % world_size
        if rest and keep_rest:
            batches = [*batches, *([[]] * (world_size - rest))]
        elif rest:
            batches = batches[:-rest]
        self.batches = [list(batch) for batch in batches[rank::world_size]]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


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
