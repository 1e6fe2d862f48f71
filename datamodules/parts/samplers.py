"""Deals whole batches to ranks, so that the number of ranks cannot change a batch."""

from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from dsg.errors import UserError


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
