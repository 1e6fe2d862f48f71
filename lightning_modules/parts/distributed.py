"""Makes frozen weights, uneven batches and sums work under DistributedDataParallel."""

from collections.abc import Sequence

import lightning
import torch
from jaxtyping import Shaped
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dsg.guard import FirstFiring
from dsg.selection import FeatureStatistics


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


def add_over_ranks(
    total: FeatureStatistics, part: FeatureStatistics | None, device: torch.device
) -> None:
    """Add what all ranks summed up in this step to a running total, in the order of the ranks.

    Where batch b is dealt to rank b modulo the number of ranks, that is the order of the batches,
    in which one process alone adds them: floating-point sums depend on it. Every rank must call
    this in every step.

    Args:
        total: Of all steps before; equal on all ranks, and again so afterwards.
        part: Statistics of this rank's batch; None where it was dealt none.
        device: Where the backend can send from.
    """
    if not _several_ranks():
        if part is not None:
            total.add(part)
        return
    # Adding zeros changes no bit of a sum.
    mine = (part or FeatureStatistics(total.d_sae)).to_vector()
    for vector in gather_rows(mine, device):
        total.add(FeatureStatistics.from_vector(vector))


def add_tensors_over_ranks(
    totals: Sequence[Tensor], parts: Sequence[Tensor], device: torch.device
) -> None:
    """Add what all ranks computed in this step to running totals, in the order of the ranks.

    As `add_over_ranks`, but one tensor after the other: they may be as large as a model.

    Args:
        totals: Of all steps before, changed in place.
        parts: This rank's, of the same shapes and types; zeros where it was dealt no batch.
        device: Where the backend can send from.
    """
    for total, part in zip(totals, parts, strict=True):
        gathered = gather_rows(part[None], device) if _several_ranks() else [part[None]]
        for row in gathered:
            total.add_(row[0].to(total.device))


def gather_firing_ranks(mine: FirstFiring, device: torch.device) -> FirstFiring:
    """The texts of all ranks; every rank must call this.

    Args:
        mine: The texts of this rank.
        device: Where the backend can send from.
    """
    if not _several_ranks():
        return mine
    gathered = FirstFiring(mine.num_features)
    texts, tokens = (gather_rows(tensor, device) for tensor in mine.packed())
    for part in zip(texts, tokens, strict=True):
        gathered.add_packed(*part)
    return gathered


def gather_rows(mine: Shaped[Tensor, "rows ..."], device: torch.device) -> list[Tensor]:
    """Every rank's tensor, on the CPU; they may differ in the number of rows.

    Args:
        mine: This rank's; element type and other axes must be the same on all ranks.
        device: Where the backend can send from.
    """
    mine = mine.to(device)
    world_size = torch.distributed.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world_size)]
    torch.distributed.all_gather(sizes, torch.tensor([len(mine)], device=device))
    longest = max(int(size) for size in sizes)
    # Backends gather equal shapes only.
    padded = mine.new_zeros(longest, *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    torch.distributed.all_gather(parts, padded)
    return [part[: int(size)].cpu() for part, size in zip(parts, sizes, strict=True)]


def _several_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
