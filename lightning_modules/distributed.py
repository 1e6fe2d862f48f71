"""Makes frozen weights, uneven batches and sums work under DistributedDataParallel."""

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

from dsg.statistics import FeatureStatistics


def exclude_frozen_from_ddp(module: lightning.LightningModule) -> None:
    """Keep DDP's hands off buffers and frozen weights.

    They are equal on all ranks, because every rank loads the same files. DDP would broadcast the
    buffers in each forward pass, validation included: a collective per batch, which hangs as soon
    as the ranks validate unequal numbers of batches.
    """
    names = [name for name, weight in module.named_parameters() if not weight.requires_grad]
    names += [name for name, _ in module.named_buffers()]
    # torch's only setter for it; FSDP and torchrec users rely on the same one.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def leave_unwrapped(strategy: Strategy) -> None:
    """Make `fit` run a module without trainable weights under DDP.

    DistributedDataParallel refuses such a module, and Lightning has no switch against wrapping in
    `fit`. Nothing is lost: there is no gradient to exchange, and the module reduces its sums
    itself. Other strategies are left as they are.
    """
    if isinstance(strategy, DDPStrategy):
        strategy.configure_ddp = _wrap_nothing  # type: ignore[method-assign]


def _wrap_nothing() -> None:
    """Stands in for `DDPStrategy.configure_ddp`."""


def merge_over_ranks(parts: dict[int, FeatureStatistics]) -> FeatureStatistics:
    """Add the statistics of all ranks' batches in the order of their ids.

    Floating-point sums depend on their order, so one rank and several add in the same one.

    Args:
        parts: Statistics of each batch that this rank was dealt, by the id of the batch.

    Raises:
        RuntimeError: Two ranks were dealt the same batch, or nobody was dealt any.
    """
    dealt = [parts]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        dealt = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(dealt, parts)
    batches = {id: part for parts in dealt for id, part in parts.items()}
    if not batches or len(batches) != sum(map(len, dealt)):
        raise RuntimeError(
            f"every batch must be dealt to exactly one rank, got {sum(map(len, dealt))} batches of "
            f"which {len(batches)} are different; number them over all ranks."
        )
    first, *rest = (batches[id] for id in sorted(batches))
    for part in rest:
        first = first.merge(part)
    return first
