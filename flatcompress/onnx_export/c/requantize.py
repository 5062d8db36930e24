"""Integers that round as onnxruntime's floats do, proved for every sum that can occur.

onnxruntime brings an int32 sum to the next grid by ``clamp(rint(float32(sum) * scale) + zero)``. Here it is one
multiplication: ``(sum * multiplier + offset) >> shift``. Both are non-decreasing in the sum (rounding is monotone), so
they are equal everywhere exactly when they step from one code to the next at the same sums; `thresholds` finds the
float rule's steps, and each is a linear constraint on the multiplier. `solve` returns a multiplier that meets all of
them, or says that there is none: nothing is sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
LARGEST_SHIFT = 53  # (2 k - 1) 2**(shift - 1) and sums times multipliers stay within int64
MULTIPLIER_BITS = 31
UNIT = 1 << 16
BYTE = 8  # bits that a result may have below its last one, which the clamp to a byte takes off
INT32 = (-(1 << 31), (1 << 31) - 1)


@dataclass
class Rule:
    """``(sum * multiplier + offset) >> shift`` for each channel, the zero point not included.

    ``narrow``: the multipliers are multiples of 2**16, so that the C stores 16 bits of them. ``floats``: no multiplier
    was found, so the C multiplies by ``scale`` in float32, as onnxruntime does.
    ``sums``: how many (channel, sum) pairs the proof covers; ``steps``: how many steps between codes it compared.
    """

    multiplier: Ints
    offset: int
    shift: int
    sums: int
    steps: int
    floats: bool = False
    narrow: bool = False

    def __call__(self, sums: Ints, channel: int) -> Ints:
        """What the C computes, for tests."""
        return (sums * self.multiplier[channel] + self.offset) >> self.shift


def float_rule(sums: Ints, scale: NDArray[np.float32]) -> Ints:
    """onnxruntime's: the sum as float32, one float32 multiplication, half to even."""
    return np.rint(sums.astype(np.float32) * scale).astype(np.int64)


def thresholds(scale: NDArray[np.float32], levels: Ints, low: Ints, high: Ints) -> Ints:
    """[channels, levels]: the smallest sum in ``low..high`` whose rounded product reaches a level; high + 1: none.

    scale: [channels] > 0. levels: ascending integers. low, high: [channels].
    """
    column = scale[:, None]
    first = np.broadcast_to(low[:, None], (len(scale), len(levels))).copy()
    last = np.broadcast_to(high[:, None] + 1, first.shape).copy()
    while (first < last).any():  # bisection: `last` reaches the level (or is one too far), below `first` none does
        middle = first + (last - first) // 2
        reached = float_rule(middle, column) >= levels
        last = np.where(reached, middle, last)
        first = np.where(reached, first, np.minimum(middle + 1, last))
    return first


def reachable(weight: NDArray[np.integer], bias: Ints, headroom: int, low: int, high: int) -> tuple[Ints, Ints]:
    """The least and largest sum of each channel, inputs (zero point taken off) between ``low`` and ``high``."""
    rows = weight.reshape(len(weight), -1).astype(np.int64) << headroom
    positive, negative = np.maximum(rows, 0).sum(1), np.minimum(rows, 0).sum(1)
    # A padded tap is a zero, which may lie outside of a grid that was clamped away from it.
    low, high = min(low, 0), max(high, 0)
    return bias + positive * low + negative * high, bias + positive * high + negative * low


def solve(
    scale: NDArray[np.float32],
    low: Ints,
    high: Ints,
    code_low: int,
    code_high: int,
    signs: Ints | None = None,
    *,
    every: int = 1,
    raisable: bool = False,
) -> Rule:
    """A rule for the channels of one layer. code_low, code_high: the result's limits, zero point taken off.

    low, high: [channels], the least and largest sum, between which they come ``every`` so many. signs: [channels] of 1
    and -1: channels whose sum the C computes negated get a negated multiplier. raisable: the C may raise sums by some
    bits where they leave room for it, so the shift may be below 32.
    """
    levels = np.arange(code_low + 1, code_high + 1, dtype=np.int64)
    steps = thresholds(scale, levels, low, high)
    steps = low[:, None] - (low[:, None] - steps) // every * every  # the next sum that there is
    sums = int(((high - low) // every + 1).sum())
    shift = _shift(scale, room(scale, low, high) - BYTE if raisable else 0)
    wanted = np.round(scale.astype(np.float64) * 2.0**shift).astype(np.int64)
    for nudge in _nudges(shift):
        least, most = _interval(steps, levels, low, high, shift, (1 << (shift - 1)) + nudge, every)
        if (least <= most).all():
            chosen, narrow = _choose(wanted, least, most)
            chosen = chosen * (1 if signs is None else signs)
            return Rule(chosen, (1 << (shift - 1)) + nudge, shift, sums, steps.size, narrow=narrow)
    return Rule(np.zeros(len(scale), np.int64), 0, shift, sums, steps.size, floats=True)


def _choose(wanted: Ints, least: Ints, most: Ints) -> tuple[Ints, bool]:
    """A multiplier of each channel's interval: multiples of 2**16 where every interval has one."""
    first, last = -(-least // UNIT), most // UNIT
    if (first <= last).all():
        return np.clip(np.round(wanted / UNIT).astype(np.int64), first, last) * UNIT, True
    return np.clip(wanted, least, most), False


def room(scale: NDArray[np.float32], low: Ints, high: Ints) -> int:
    """By how many bits every sum and product may be raised within 32 bits."""
    reach, most = np.maximum(high, -low), float((np.maximum(high, -low) * scale.astype(np.float64)).max())
    return max(0, min(31 - int(reach.max()).bit_length(), 24 - int(most).bit_length()))


def _shift(scale: NDArray[np.float32], raised: int = 0) -> int:
    """The largest shift with which the largest multiplier fits, at least 32: the high word of a product is free.
    raised: so many bits less where sums can be raised."""
    largest = MULTIPLIER_BITS - 1 - int(np.ceil(np.log2(float(scale.max()))))
    return int(np.clip(largest, 32 - max(0, raised), LARGEST_SHIFT))


def _nudges(shift: int) -> list[int]:
    """Offsets beside one half, the plain half first.

    Where float32 rounds a product to a tie, half to even goes down at one sum and up at another; a small offset with
    a slightly larger or smaller multiplier does the same.
    """
    sizes = [1 << k for k in range(4, shift - 14)]
    return [0] + [sign * size for size in sizes for sign in (-1, 1)]


def _interval(
    steps: Ints, levels: Ints, low: Ints, high: Ints, shift: int, offset: int, every: int = 1
) -> tuple[Ints, Ints]:
    """[channels]: the multipliers with which every level is reached at its step and not before."""
    target = (levels << shift) - offset
    limit = (1 << MULTIPLIER_BITS) - 1
    least = np.zeros(len(low), np.int64)
    most = np.full(len(low), limit, np.int64)
    for sums, exists, reaches in ((steps, steps <= high[:, None], True), (steps - every, steps > low[:, None], False)):
        at_least, at_most = _bounds(sums, np.broadcast_to(target, sums.shape), reaches)
        least = np.maximum(least, np.where(exists, at_least, 0).max(1, initial=0))
        most = np.minimum(most, np.where(exists, at_most, limit).min(1, initial=limit))
    return least, most


def _bounds(sums: Ints, target: Ints, reaches: bool) -> tuple[Ints, Ints]:
    """Of ``sum * m >= target`` (or ``< target``): the least and the largest m >= 0."""
    far = np.int64(1 << 40)
    divisor = np.where(sums == 0, 1, sums)
    floor = np.floor_divide(target, divisor)
    ceiling = -np.floor_divide(-target, divisor)
    if reaches:
        least = np.where(sums > 0, ceiling, np.where((sums == 0) & (target > 0), far, 0))
        most = np.where(sums < 0, floor, far)
    else:
        least = np.where(sums < 0, floor + 1, np.where((sums == 0) & (target <= 0), far, 0))
        most = np.where(sums > 0, ceiling - 1, far)
    return least, most
