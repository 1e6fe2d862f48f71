import math

import pytest

from dsg.errors import UserError
from dsg.evaluation.fluency import gibberish_rate, gibberish_threshold


def test_threshold_by_hand():
    # 101 losses 0.00, 0.01, ..., 1.00: the 99th percentile is 0.99.
    own = [index / 100 for index in range(101)]
    assert gibberish_threshold(own) == pytest.approx(0.99 + math.log(10))
    assert gibberish_threshold([*own, math.nan]) == pytest.approx(0.99 + math.log(10))


def test_rate_by_hand():
    own = [0.5, 0.5, 0.5]
    limit = 0.5 + math.log(10)
    found = gibberish_rate([0.1, limit - 1e-9, limit + 1e-9, 9.0, math.nan], own)
    assert (found.value, found.n) == (0.5, 4)
    assert found.low == pytest.approx(0.1500, abs=1e-4)


def test_the_unguarded_model_writes_no_gibberish():
    own = [0.3, 0.9, 1.4, 2.2]
    assert gibberish_rate(own, own).value == 0.0


def test_nothing_to_compare_with():
    with pytest.raises(UserError, match="generate without the guard"):
        gibberish_rate([1.0], [math.nan])
