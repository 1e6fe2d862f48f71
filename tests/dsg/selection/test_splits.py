from dsg.selection.splits import evenly


def test_at_most_so_many_taken_evenly():
    assert evenly(range(10), 4) == [0, 2, 5, 7]
    assert evenly([1, 2], 5) == [1, 2]
    assert evenly([], 5) == []


def test_fewer_items_are_repeated_evenly():
    assert evenly([1, 2], 5, repeat=True) == [1, 1, 1, 2, 2]
