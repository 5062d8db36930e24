"""Axes for whatever a run's log holds: finite ticks, and every line within reach."""

import math

import pytest

from flatcompress.report.charts import Axis, Series, _Scale, line_chart

VALUES = [0.0, 5e-324, 1e-310, 1e-300, 1.0, 1e300, 1.5e308, 1.7976931348623157e308]
SIGNED = sorted({*VALUES, *(-v for v in VALUES)})


@pytest.mark.parametrize("log", [False, True])
def test_every_pair_of_floats_has_an_axis_of_finite_ticks(log: bool) -> None:
    values = [v for v in VALUES if v] if log else SIGNED
    for low in values:
        for high in (v for v in values if v >= low):
            scale = _Scale(low, high, log, zero=False)
            assert all(math.isfinite(t) for t in scale.ticks), (low, high)
            assert scale.ticks == sorted(set(scale.ticks)) and len(scale.ticks) > 1, (low, high)
            assert all(math.isfinite(scale.y(v)) for v in (low, high)), (low, high)


def test_a_chart_of_extremes_is_drawn() -> None:
    axis = Axis([0.0, 1.0], ["a", "b"])
    for pair in ([5e-324, 1e-323], [1.0, 1.7e308], [1e308, 1.7e308]):
        for log in (False, True):
            assert "svg" in line_chart("any", axis, [Series("one", 0, pair)], log=log)
