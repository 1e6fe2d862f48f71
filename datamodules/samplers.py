"""Deals whole batches to ranks, so that the number of ranks cannot change a batch."""

from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from dsg.errors import UserError


class GlobalBatches(Sampler[list[int]]):
    """A batch sampler over batches that were formed before anybody asked for ranks.

    Rank r takes the batches r, r + world_size, ...: none is padded, repeated or split, and a rank
    may get none. Use it with `Trainer(use_distributed_sampler=False)`.

    Args:
        batches: Sample indices of each batch.
        rank: This process, in `[0, world_size)`.
        world_size: Number of processes.
        equal_steps: For training, where each rank must take equally many steps: leave out the last
            `len(batches) % world_size` batches.
        keep_rest: With `equal_steps`, leave out none of them, but give an empty batch to the ranks
            that have none in the last round; for sums, in which every batch counts.

    Raises:
        UserError: `rank` or `world_size` is out of range.
    """

    def __init__(
        self,
        batches: Sequence[Sequence[int]],
        rank: int = 0,
        world_size: int = 1,
        equal_steps: bool = False,
        keep_rest: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise UserError(
                f"`rank` must lie in [0, world_size), got rank {rank} of {world_size}; take both "
                "from the trainer (global_rank, world_size)."
            )
        rest = len(batches) % world_size if equal_steps else 0
        if rest and keep_rest:
            batches = [*batches, *([[]] * (world_size - rest))]
        elif rest:
            batches = batches[:-rest]
        self.batches = [list(batch) for batch in batches[rank::world_size]]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
