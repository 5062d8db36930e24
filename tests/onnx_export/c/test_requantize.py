from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatcompress.onnx_export.c import requantize, sums
from flatcompress.onnx_export.c.ir import Codes
from flatcompress.onnx_export.lower.integer import Grid


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(1e-4, 0.6), min_size=1, max_size=6),
    st.integers(-40_000, 0),
    st.integers(1, 40_000),
    st.sampled_from([(0, 15), (0, 255), (-128, 127), (-8, 7), (3, 9), (0, 3)]),
)
def test_a_rule_equals_the_float_rule_for_every_sum(scales, low, high, limits):
    scale = np.array(scales, np.float32)
    rule = requantize.solve(scale, np.full(len(scale), low), np.full(len(scale), high), *limits)
    assert rule.sums == len(scale) * (high - low + 1)
    if rule.floats:  # the C then multiplies as onnxruntime does
        return
    every = np.arange(low, high + 1)
    for channel, value in enumerate(scale):
        expected = np.clip(requantize.float_rule(every, value), *limits)
        assert np.array_equal(np.clip(rule(every, channel), *limits), expected)


@pytest.mark.parametrize("value", [0.05585284158587456, 0.0011169310892000794, 0.003463964443653822])
def test_a_scale_whose_ties_go_both_ways_is_solved_by_an_offset(value):
    # float32 rounds one product to a tie that goes down and another to one that goes up: one half does not do.
    scale = np.array([value], np.float32)
    low, high = np.array([0]), np.array([40_000])
    levels = np.arange(1, 256)
    steps = requantize.thresholds(scale, levels, low, high)
    shift = requantize._shift(scale)
    least, most = requantize._interval(steps, levels, low, high, shift, 1 << (shift - 1))
    assert (least > most).all()
    rule = requantize.solve(scale, low, high, 0, 255)
    assert not rule.floats and rule.offset != 1 << (rule.shift - 1)
    every = np.arange(40_001)
    assert np.array_equal(np.clip(rule(every, 0), 0, 255), np.clip(requantize.float_rule(every, scale[0]), 0, 255))


def test_a_scale_that_no_offset_solves_is_left_to_floats():
    rule = requantize.solve(np.array([2.5 / 304], np.float32), np.array([0]), np.array([40_000]), 0, 255)
    assert rule.floats


def test_thresholds_are_the_first_sums_that_reach_a_level():
    scale = np.array([0.013, 0.4], np.float32)
    levels = np.arange(-7, 9)
    found = requantize.thresholds(scale, levels, np.array([-900, -900]), np.array([700, 700]))
    every = np.arange(-900, 701)
    for channel in range(2):
        codes = requantize.float_rule(every, scale[channel])
        wanted = [every[codes >= level][0] if (codes >= level).any() else 701 for level in levels]
        assert found[channel].tolist() == wanted


def codes(scale: float, zero: int, low: int, high: int) -> Codes:
    return Codes("t", 1, 1, 1, Grid(scale, zero, low, high, 8))


@pytest.mark.parametrize("out", [(0.41624, 0, 0, 15), (0.26722, 128, 0, 255), (0.92971, 128, 120, 135)])
def test_an_addition_equals_onnxruntimes_for_every_pair(out):
    a, b, to = codes(0.17268819, 128, 0, 255), codes(0.20352995, 0, 0, 15), codes(*out)
    rule = sums.solve_add(a, b, to)
    assert rule.pairs == 256 * 16 and not rule.floats
    x, y = np.meshgrid(np.arange(256), np.arange(16), indexing="ij")
    found = np.clip((x * rule.first + y * rule.second + rule.offset) >> rule.shift, to.low, to.high)
    assert np.array_equal(found, sums.expected(a, b, to)[0])
