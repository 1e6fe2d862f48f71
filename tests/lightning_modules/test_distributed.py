import pytest
import torch

from dsg.statistics import FeatureStatistics
from lightning_modules.distributed import exclude_frozen_from_ddp, merge_over_ranks


def statistics(seed: int) -> FeatureStatistics:
    found = FeatureStatistics(3)
    acts = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(seed))
    found.update(acts, torch.ones(2, 5, dtype=torch.bool), residual=acts)
    return found


def test_batches_are_added_in_the_order_of_their_ids():
    parts = {index: statistics(index) for index in range(6)}
    shuffled = {index: parts[index] for index in (4, 0, 5, 2, 1, 3)}
    expected = parts[0]
    for index in range(1, 6):
        expected = expected.merge(parts[index])
    merged = merge_over_ranks(shuffled)
    for name in ("sum", "sum_of_squares", "num_fired", "residual_norm_sum"):
        assert torch.equal(getattr(merged, name), getattr(expected, name))
    assert merged.num_tokens == expected.num_tokens == 60


def test_parts_of_other_ranks_count_and_may_be_missing(monkeypatch):
    parts = {index: statistics(index) for index in range(3)}
    ranks = [{0: parts[0], 2: parts[2]}, {1: parts[1]}, {}]
    fake_ranks(monkeypatch, ranks)
    assert torch.equal(merge_over_ranks(ranks[0]).sum, merge_locally(parts).sum)


def test_a_batch_that_two_ranks_were_dealt(monkeypatch):
    ranks = [{0: statistics(0)}, {0: statistics(0)}]
    fake_ranks(monkeypatch, ranks)
    with pytest.raises(RuntimeError, match="got 2 batches of which 1 are different"):
        merge_over_ranks(ranks[0])


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


def merge_locally(parts: dict[int, FeatureStatistics]) -> FeatureStatistics:
    return parts[0].merge(parts[1]).merge(parts[2])


def fake_ranks(monkeypatch, ranks: list[dict]) -> None:
    def all_gather_object(gathered: list, _mine: dict) -> None:
        gathered[:] = ranks

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: len(ranks))
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
