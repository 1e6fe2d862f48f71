import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsg.errors import UserError
from dsg.selection.calibration import calibrate_threshold, false_positive_rate


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0, 100))
def test_threshold_is_numpys_percentile(densities, percentile):
    tensor = torch.tensor(densities, dtype=torch.float64)
    assert calibrate_threshold(tensor, percentile) == np.percentile(densities, percentile)


def test_false_positives_are_strictly_above_the_threshold():
    rate = false_positive_rate(torch.tensor([0.1, 0.5, 0.5, 0.9], dtype=torch.float64), 0.5)
    assert (rate.value, rate.n) == (0.25, 4)


def test_errors():
    with pytest.raises(UserError, match="`densities` must be finite and at least one, got 0"):
        calibrate_threshold(torch.zeros(0))
    with pytest.raises(UserError, match="`threshold_percentile` must be in"):
        calibrate_threshold(torch.zeros(3), 101.0)
