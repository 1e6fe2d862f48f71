import multiprocessing

import pytest
import torch

from dsg.guard.sweep import FirstFiring
from dsg.selection.statistics import FeatureStatistics
from lightning_modules.parts.distributed import (
    add_over_ranks,
    exclude_frozen_from_ddp,
    gather_firing_ranks,
)

CPU = torch.device("cpu")
NUM_BATCHES = 5


def statistics(batch: int) -> FeatureStatistics:
    found = FeatureStatistics(3)
    acts = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(batch))
    found.update(acts, torch.ones(2, 5, dtype=torch.bool), residual=acts)
    return found


def firing_ranks(batches: range) -> FirstFiring:
    found = FirstFiring(300)  # two bytes a token
    for batch in batches:
        active = torch.rand(2, 4, 300, generator=torch.Generator().manual_seed(batch)) > 0.99
        counted = torch.tensor([[True] * 4, [True] * (batch % 4) + [False] * (4 - batch % 4)])
        found.update(torch.tensor([2 * batch, 2 * batch + 1]), active, counted)
    return found


def work(rank: int, world_size: int, address: str, num_batches: int, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=world_size
    )
    total = FeatureStatistics(3)
    for first in range(0, num_batches, world_size):
        batch = first + rank
        add_over_ranks(total, statistics(batch) if batch < num_batches else None, CPU)
    gathered = gather_firing_ranks(firing_ranks(range(rank, num_batches, world_size)), CPU)
    results.put((rank, total.to_vector().numpy(), gathered.densities(77).numpy()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("world_size", "num_batches"), [(2, NUM_BATCHES), (3, 2)])
def test_every_rank_gets_the_bits_of_one_process(tmp_path, world_size, num_batches):
    # In the second case the last rank has no batch at all.
    alone = FeatureStatistics(3)
    for batch in range(num_batches):
        add_over_ranks(alone, statistics(batch), CPU)
    densities = firing_ranks(range(num_batches)).densities(77).numpy()
    assert len(set(densities.tolist())) > 1

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    address = f"file://{tmp_path}/rendezvous"
    processes = [
        context.Process(target=work, args=(rank, world_size, address, num_batches, results))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        found = [results.get(timeout=60) for _ in processes]
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    assert {rank for rank, _, _ in found} == set(range(world_size))
    for _, vector, gathered in found:
        assert vector.tobytes() == alone.to_vector().numpy().tobytes()
        assert gathered.tobytes() == densities.tobytes()


def test_one_process_adds_batch_after_batch():
    total, expected = FeatureStatistics(3), FeatureStatistics(3)
    for batch in range(NUM_BATCHES):
        add_over_ranks(total, statistics(batch), CPU)
        expected.sum += statistics(batch).sum
        expected.num_tokens += 10
    add_over_ranks(total, None, CPU)
    assert torch.equal(total.sum, expected.sum)
    assert total.num_tokens == expected.num_tokens == 50


def test_nothing_but_trained_weights_is_left_to_ddp():
    import lightning

    module = lightning.LightningModule()
    module.layer = torch.nn.BatchNorm1d(2)
    module.layer.bias.requires_grad_(False)
    exclude_frozen_from_ddp(module)
    assert set(module._ddp_params_and_buffers_to_ignore) == {
        "layer.bias",
        "layer.running_mean",
        "layer.running_var",
        "layer.num_batches_tracked",
    }
