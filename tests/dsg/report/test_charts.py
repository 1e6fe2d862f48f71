"""Charts show what was measured."""

import pytest

from dsg.report.charts import density_histograms
from dsg.report.files import Densities


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("values", [[0.0], [0.3, 0.3, 0.7], [1.0, 0.0]])
def test_histograms_count_as_the_gate_does(threshold, values):
    figure = density_histograms(Densities(threshold, {"forget": values}))
    share = sum(value > threshold for value in values) / len(values)
    (axes,) = figure.axes
    assert f"{share:.0%} of {len(values)} trigger" in axes.get_title(loc="left")
    left = sum(bar.get_height() for bar in axes.patches if bar.get_x() < threshold - 1e-9)
    if threshold > 0:
        assert left == pytest.approx(100 * (1 - share))
    assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(100)
