import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.samplers import GlobalBatches
from dsg.errors import UserError

batch_lists = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4), max_size=9)


@given(batches=batch_lists, world_size=st.integers(1, 5))
def test_ranks_together_take_every_batch_exactly_once(batches, world_size):
    dealt = [list(GlobalBatches(batches, rank, world_size)) for rank in range(world_size)]
    merged = [dealt[index % world_size][index // world_size] for index in range(len(batches))]
    assert merged == batches
    assert sum(map(len, dealt)) == len(batches)


def test_a_rank_may_get_nothing():
    assert list(GlobalBatches([[1, 2]], rank=1, world_size=2)) == []
    assert len(GlobalBatches([[1, 2]], rank=1, world_size=2)) == 0


def test_equal_steps_leave_out_the_incomplete_round():
    batches = [[0], [1], [2], [3], [4]]
    dealt = [list(GlobalBatches(batches, rank, 2, equal_steps=True)) for rank in range(2)]
    assert dealt == [[[0], [2]], [[1], [3]]]


def test_equal_steps_can_keep_the_rest_with_empty_batches():
    dealt = [
        list(GlobalBatches([[0], [1], [2], [3]], rank, 3, equal_steps=True, keep_rest=True))
        for rank in range(3)
    ]
    assert dealt == [[[0], [3]], [[1], []], [[2], []]]


def test_rank_out_of_range():
    with pytest.raises(UserError, match=r"`rank` must lie in .* got rank 2 of 2"):
        GlobalBatches([], rank=2, world_size=2)
