"""Weights as the kernels read them: digits of their true width, in words of pairs or in a stream.

A digit is a weight less the lowest one of its layer. `rows` serves convolutions: a word holds, for each of its steps,
the digits of two taps in the same place of its two halves, so that one AND gives two 16-bit factors. Widths that do not
divide 16 are split into planes (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2) that lie one after the other in a row. `stream` serves
depthwise layers, which unpack a channel once: digits without a gap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flatcompress.onnx_export.c.ir import Conv

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
WIDENED = np.array([0, 2, 1, 3])  # where the kernel puts the taps of four bytes


@dataclass
class Digits:
    """values: int [out, taps], 0 .. 2**bits - 1. lowest: the weight that 0 stands for. signs: [out], 1 or -1; a
    channel with -1 is stored negated, because a flipped -8 is a +8, which would cost all others a bit."""

    values: NDArray[np.int64]
    lowest: int
    bits: int
    signs: NDArray[np.int64]


def digits(conv: Conv) -> Digits:
    """The narrowest grid that holds a layer's weights, rows negated where that helps."""
    rows = conv.weight.reshape(conv.outputs, -1)
    half = 1 << (conv.bits - 1)
    signs = np.where((rows.max(1) >= half) & (rows.min(1) > -half), -1, 1).astype(np.int64)
    turned = rows * signs[:, None]
    if turned.max() - turned.min() > rows.max() - rows.min():
        signs, turned = np.ones_like(signs), rows
    lowest = int(turned.min())
    bits = max(1, int(turned.max() - lowest).bit_length())
    if conv.bits in (1, 2, 4, 8) and not conv.depthwise:  # one plane is half the instructions of two
        bits = next(width for width in (1, 2, 4, 8) if width >= bits)
    return Digits(turned - lowest, lowest, 8 if bits == 7 else bits, signs)


def unit(bits: int) -> int:
    """Taps that fill whole words in every plane."""
    return 32 // min(PLANES[bits])


def rows(found: Digits) -> NDArray[np.uint32]:
    """[out, words]: each row's planes, one after the other."""
    outputs, taps = found.values.shape
    width = -(-taps // unit(found.bits)) * unit(found.bits)
    filled = np.zeros((outputs, width), np.int64)
    filled[:, :taps] = found.values
    # Tap k lies at halfword 4 (k // 4) + WIDENED[k % 4] of the patch.
    halves = filled.reshape(outputs, -1, 4)[:, :, np.argsort(WIDENED)].reshape(outputs, width)
    planes, place = [], 0
    for bits in PLANES[found.bits]:
        planes.append(_words((halves >> place) & ((1 << bits) - 1), bits))
        place += bits
    return np.concatenate(planes, axis=1)


def _words(plane: NDArray[np.int64], bits: int) -> NDArray[np.uint32]:
    steps = 16 // bits
    grouped = plane.reshape(len(plane), -1, steps, 2).astype(np.uint64)
    low, high = (grouped[..., half] << (np.arange(steps, dtype=np.uint64) * np.uint64(bits)) for half in (0, 1))
    return (low.sum(-1) | (high.sum(-1) << np.uint64(16))).astype(np.uint32)


def stream(found: Digits) -> NDArray[np.uint8]:
    """Bytes of all digits, channel by channel, the first digit in the lowest bits."""
    flat = found.values.reshape(-1)
    bits = (flat[:, None] >> np.arange(found.bits)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")


WIDE, BITS, BYTES = 0, 1, 2  # the kernels of sparse layers


@dataclass
class Entries:
    """A sparse layer's stream: of each weight that is not zero, the zeros before it (``gap`` bits) and its digit.

    ``pairs``: `WIDE`, or where the sums of every row fit 16 bits, so that the kernel adds two pixels in one word,
    `BITS` or (entries of a byte: a signed weight of four bits and four bits of gap) `BYTES`. count: of entries.
    """

    stream: NDArray[np.uint8]
    gap: int
    pairs: int
    count: int


def entries(found: Digits, most: int) -> Entries:
    """The stream with the gap width that takes the fewest bytes. most: the largest code of the input.

    A gap wider than its bits is bridged by entries whose weight is zero.
    """
    values = found.values + found.lowest
    reach = max(int(np.maximum(values, 0).sum(1).max()), int(np.maximum(-values, 0).sum(1).max())) * most
    narrow = reach < 1 << 15
    best = min((_stream(values, found, gap) for gap in range(1, 9)), key=lambda made: len(made[0]))
    if narrow and found.bits in (3, 4) and values.min() >= -8 and values.max() <= 7:
        skipped, digit = _gaps(values, 4)
        if len(skipped) <= 1.05 * len(best[0]):  # decoded in a third of the instructions
            return Entries(((skipped << 4) | (digit & 15)).astype(np.uint8), 4, BYTES, len(skipped))
    return Entries(*best[:2], BITS if narrow else WIDE, best[2])


def _stream(values: NDArray[np.int64], found: Digits, gap: int) -> tuple[NDArray[np.uint8], int, int]:
    skipped, weight = _gaps(values, gap)
    bits = ((skipped | ((weight - found.lowest) << gap))[:, None] >> np.arange(gap + found.bits)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little"), gap, len(skipped)


def _gaps(values: NDArray[np.int64], gap: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of every entry, the zeros before it and its weight; the last ones lie beyond the last row, which ends it."""
    flat, longest = values.reshape(-1), 1 << gap
    places = np.flatnonzero(flat)
    steps = np.diff(places, prepend=-1)
    fillers = (steps - 1) // longest
    beyond = (flat.size - 1 - (int(places[-1]) if len(places) else -1)) // longest + 1
    total = len(places) + int(fillers.sum())
    at = np.cumsum(fillers + 1) - 1
    skipped, weight = np.full(total + beyond, longest - 1, np.int64), np.zeros(total + beyond, np.int64)
    skipped[at], weight[at] = (steps - 1) % longest, flat[places]
    return skipped, weight


def true_bytes(conv: Conv) -> float:
    """Bits per weight, or a mask bit per weight and the bits of each weight that is not zero."""
    size, nonzero = conv.weight.size, int(np.count_nonzero(conv.weight))
    return min(size * conv.bits, size + nonzero * conv.bits) / 8
