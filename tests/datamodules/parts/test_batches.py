import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.parts.batches import GlobalBatches
from dsg.errors import UserError

batch_lists = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4), max_size=9)


def dealt(batches, world_size, keep_rest):
    return [
        list(GlobalBatches(batches, rank, world_size, keep_rest=keep_rest))
        for rank in range(world_size)
    ]


@given(batches=batch_lists, world_size=st.integers(1, 5))
def test_ranks_together_take_every_batch_exactly_once(batches, world_size):
    hands = dealt(batches, world_size, keep_rest=True)
    merged = [hands[index % world_size][index // world_size] for index in range(len(batches))]
    assert merged == batches
    assert sum(bool(batch) for hand in hands for batch in hand) == len(batches)
    assert len({len(hand) for hand in hands}) == 1


def test_the_rest_goes_to_the_first_ranks_or_to_nobody():
    batches = [[0], [1], [2], [3]]
    assert dealt(batches, 3, keep_rest=True) == [[[0], [3]], [[1], []], [[2], []]]
    assert dealt(batches, 3, keep_rest=False) == [[[0]], [[1]], [[2]]]
    assert dealt(batches, 2, keep_rest=False) == [[[0], [2]], [[1], [3]]]


def test_rank_out_of_range():
    with pytest.raises(UserError, match=r"`rank` must lie in .* got rank 2 of 2"):
        GlobalBatches([], rank=2, world_size=2, keep_rest=True)
