"""Checks that all parts share: choices, seeds, near names, chains of errors."""

import pytest

from dsg.errors import MAX_SEED, UserError, chain, check_each_once, check_seeds, did_you_mean


def test_a_ring_of_errors_is_walked_once():
    first, second = ValueError("first"), KeyError("second")
    first.__cause__, second.__cause__ = second, first
    assert list(chain(first)) == [first, second]
    assert list(chain(None)) == []


@pytest.mark.parametrize("seeds", [[], [0, 0], [-1], [MAX_SEED + 1]])
def test_seeds_that_are_none_or_would_count_double_are_refused(seeds):
    with pytest.raises(UserError, match="`--seeds` must"):
        check_seeds("--seeds", seeds)
    check_seeds("--seeds", [0, MAX_SEED])


def test_values_that_cannot_be_hashed_are_compared_too():
    with pytest.raises(UserError, match="none twice"):
        check_each_once("grid", [[1], [1]])
    check_each_once("grid", [[1], [2]])


def test_near_names():
    assert did_you_mean("methd", ["method", "gate"]) == "; did you mean method?"
    assert did_you_mean("zzz", ["method", "gate"]) == ""
