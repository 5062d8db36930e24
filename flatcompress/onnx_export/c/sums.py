"""Additions of codes as integers, proved over every pair of codes.

onnxruntime computes ``rint(a r_a + b r_b + c)`` with two fused multiply-adds (`integer.IntegerAdd`); on a processor
without them a pair of codes here and there may round the other way, and the certificate counts those.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flatcompress.onnx_export.c.ir import Codes

SHIFTS = range(24, 9, -1)
# Multipliers beside the nearest ones, the nearest first: a sum that floats round to a tie may need another.
_NEAR = sorted(itertools.product(range(-8, 9), repeat=2), key=lambda near: (near[0] ** 2 + near[1] ** 2, near))


@dataclass
class AddRule:
    """``(a * first + b * second + offset) >> shift``, zero points included, before the clamp to ``out``'s limits.

    ``pairs``: of codes, all of which were compared. ``unfused``: those that differ where nothing fuses multiplication
    and addition. ``floats``: no integers were found; the C uses ``ratios``, and doubles to fuse.
    """

    first: int
    second: int
    offset: int
    shift: int
    pairs: int
    unfused: int
    ratios: tuple[np.float32, np.float32, np.float32]
    floats: bool = False


def solve_add(a: Codes, b: Codes, out: Codes) -> AddRule:
    """The rule for stored bytes of ``a`` and ``b``."""
    wanted, plain, ratios = expected(a, b, out)
    pairs, unfused = int(wanted.size), int((wanted != plain).sum())
    real = np.float64(a.grid.scale) / out.grid.scale, np.float64(b.grid.scale) / out.grid.scale
    for shift in SHIFTS:
        nearest = [round(float(value) * 2**shift) for value in real]
        if (nearest[0] * a.high + nearest[1] * b.high) + (256 << shift) >= 1 << 31:
            continue
        for near in _NEAR:
            first, second = nearest[0] + near[0], nearest[1] + near[1]
            least, most = _offsets(first, second, shift, wanted, out)
            if least <= most:
                return AddRule(first, second, (least + most) // 2, shift, pairs, unfused, ratios)
        break  # fewer bits are less exact
    return AddRule(0, 0, 0, 0, pairs, unfused, ratios, floats=True)


def _offsets(first: int, second: int, shift: int, wanted: NDArray[np.int64], out: Codes) -> tuple[int, int]:
    """The offsets with which every pair of codes gives what is wanted; clamped results bind on one side alone."""
    x, y = np.ogrid[: wanted.shape[0], : wanted.shape[1]]
    total = x * first + y * second
    at_least = np.where(wanted > out.low, (wanted << shift) - total, -(1 << 40))
    at_most = np.where(wanted < out.high, ((wanted + 1) << shift) - 1 - total, 1 << 40)
    return int(at_least.max()), int(at_most.min())


def expected(
    a: Codes, b: Codes, out: Codes
) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[np.float32, np.float32, np.float32]]:
    """onnxruntime's result as stored bytes for every pair, fused and not, and its three float constants."""
    one = np.float32
    first, second = one(a.grid.scale) / one(out.grid.scale), one(b.grid.scale) / one(out.grid.scale)
    fixed = one(out.grid.zero_point) - (first * one(a.grid.zero_point) + second * one(b.grid.zero_point))
    x = (np.arange(a.high + 1) + a.base)[:, None].astype(np.float64)
    y = (np.arange(b.high + 1) + b.base)[None, :].astype(np.float64)
    inner = (y * np.float64(second) + np.float64(fixed)).astype(one)
    fused = (x * np.float64(first) + inner.astype(np.float64)).astype(one)
    plain = x.astype(one) * first + (y.astype(one) * second + fixed)
    limits = out.grid.low, out.grid.high
    codes = [np.clip(np.rint(v).astype(np.int64), *limits) - out.base for v in (fused, plain)]
    return codes[0], codes[1], (first, second, fixed)
