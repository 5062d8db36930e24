"""Weights as the kernels read them: digits of their true width, in words of pairs or in a stream.

A digit is a weight less the lowest one of its layer. `rows` serves convolutions: a word holds, for each of its steps,
the digits of two taps in the same place of its two halves, so that one AND gives two 16-bit factors. Widths that do not
divide 16 are split into planes (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2) that lie one after the other in a row. `stream` serves
depthwise layers, which unpack a channel once: digits without a gap.
"""

from __future__ import annotations

from collections.abc import Iterable
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


def rows(found: Digits, fill: int = 0) -> NDArray[np.uint32]:
    """[out, words]: each row's planes, one after the other, filled up with the digit ``fill``."""
    outputs, taps = found.values.shape
    width = -(-taps // unit(found.bits)) * unit(found.bits)
    filled = np.full((outputs, width), fill, np.int64)
    filled[:, :taps] = found.values
    # Tap k lies at halfword 4 (k // 4) + WIDENED[k % 4] of the patch.
    halves = filled.reshape(outputs, -1, 4)[:, :, np.argsort(WIDENED)].reshape(outputs, width)
    planes, place = [], 0
    for bits in PLANES[found.bits]:
        planes.append(_pack((halves >> place) & ((1 << bits) - 1), bits))
        place += bits
    return np.concatenate(planes, axis=1)


def _pack(plane: NDArray[np.int64], bits: int) -> NDArray[np.uint32]:
    steps = 16 // bits
    grouped = plane.reshape(len(plane), -1, steps, 2).astype(np.uint64)
    low, high = (grouped[..., half] << (np.arange(steps, dtype=np.uint64) * np.uint64(bits)) for half in (0, 1))
    return (low.sum(-1) | (high.sum(-1) << np.uint64(16))).astype(np.uint32)


def stream(found: Digits, kernel: tuple[int, int], turned: bool) -> NDArray[np.uint8]:
    """Bytes of all digits, channel by channel, the first digit in the lowest bits. turned: column by column. Where it
    is shorter (`masked`), a bit for every weight, and behind it the digit of one that is not zero."""
    values = found.values.reshape(-1, *kernel)
    flat = (values.transpose(0, 2, 1) if turned else values).reshape(-1)
    bits = (flat[:, None] >> np.arange(found.bits)) & 1
    if masked(found):
        there = flat + found.lowest != 0
        kept = np.concatenate([np.ones((len(flat), 1), bool), np.repeat(there[:, None], found.bits, 1)], 1)
        bits = np.concatenate([there[:, None], bits], 1)[kept]
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")


def masked(found: Digits) -> bool:
    """Whether a bit for every weight saves more digits of zeros than it costs."""
    zeros = int(np.count_nonzero(found.values + found.lowest == 0))
    return zeros * found.bits > found.values.size


WIDE, WORDS, BYTES, ENDED = 0, 1, 2, 3  # forms of a sparse layer's stream, as sparse.h has them
PARTS = (1, 2, 4, 8)
GAPS = range(1, 9)
ROW_GAP = 4  # bits of a distance in the words of a row of one vector


@dataclass
class Entries:
    """A sparse layer's stream: of each weight that is not zero, its distance from the last one and the weight itself.

    ``form``: `WIDE`, a weight of 8 bits and four bits of distance; or where sums fit 16 bits, so that the kernel adds
    two pixels in one word, `WORDS` (``gap`` bits of distance, ``bits`` of a signed weight), `BYTES` (four bits each) or
    `ENDED`, words whose distances begin anew with every row, which an entry without a distance ends.
    ``parts``: into how many a column of taps is divided so that the sums of each fit; 0: whole rows do.
    count: of entries. turned: taps row by row, for a kernel that takes the image with its sides exchanged. whole: the
    kernel gathers all taps of a group of pixels one after the other, so that a row is one column. runs: it gathers
    along lines.
    """

    stream: NDArray[np.uint8] | NDArray[np.uint32]
    gap: int
    bits: int
    form: int
    parts: int
    count: int
    turned: bool = False
    whole: bool = False
    runs: bool = False


def entries(
    conv: Conv, found: Digits, most: int, gaps: Iterable[int] = GAPS, *, turned: bool = False, ended: bool = False
) -> Entries:
    """The stream that takes the fewest bytes, taps column by column. most: the input's largest code. gaps: bits of a
    distance. turned: taps row by row instead. ended: rows may have ends of their own, which takes fewer instructions.

    A distance beyond its bits is bridged by entries whose weight is zero.
    """
    values = _signed(conv, found)
    values = values if turned else values.transpose(0, 2, 1, 3)
    columns = np.ascontiguousarray(values).reshape(conv.outputs, values.shape[1], -1)
    bits, parts = _signed_bits(values), _parts(columns, most)
    if bits > 4 or parts is None:
        return _wide(columns, 2)
    if ended and not parts:
        width = 2 if bits <= 2 else 4  # few kinds of words, so that all layers have the same: constants
        return min((_ended(columns, width, gap) for gap in gaps), key=price)
    best = min((_words(columns, bits, gap, parts) for gap in gaps), key=price)
    if bits > 2:
        distance, digit = _gaps(columns, 15)
        if len(distance) <= 1.15 * best.stream.nbytes:  # decoded in fewer instructions
            return Entries(((distance << 4) | (digit & 15)).astype(np.uint8), 4, 4, BYTES, parts, len(distance))
    return best


def price(made: Entries) -> float:
    """Bytes, and a quarter of one for every entry: those that only bridge a distance take instructions."""
    return made.stream.nbytes + made.count / 4


def row_entries(conv: Conv, found: Digits) -> Entries:
    """The stream of a kernel for one vector: of `WIDE`, or of `WORDS` with all distances below all weights. A row ends
    with a group of entries (four, or a word), and begins behind the last."""
    rows = _signed(conv, found).reshape(conv.outputs, -1)
    bits = max(2, _signed_bits(rows))
    if bits > 4:
        return _wide(rows, 4)
    each = row_group(bits)
    distance, weight = _gaps(rows, (1 << ROW_GAP) - 1, each)
    count = len(distance)
    distance, weight = _filled(distance, weight, each, (1 << ROW_GAP) - 1)
    places = np.arange(each, dtype=np.uint64)
    low = distance.astype(np.uint64) << (places * np.uint64(ROW_GAP))
    high = (weight & ((1 << bits) - 1)).astype(np.uint64) << (places * np.uint64(bits) + np.uint64(ROW_GAP * each))
    return Entries((low | high).sum(1).astype(np.uint32), ROW_GAP, bits, WORDS, 0, count)


def row_group(bits: int) -> int:
    """Entries of a word of a row of one vector."""
    return 32 // (ROW_GAP + bits)


def _signed(conv: Conv, found: Digits) -> NDArray[np.int64]:
    return (found.values + found.lowest).reshape(*conv.weight.shape)


def _filled(
    distance: NDArray[np.int64], weight: NDArray[np.int64], each: int, longest: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Both as rows of ``each``, filled up with entries beyond the end."""
    short = -len(distance) % each
    distance, weight = np.append(distance, np.full(short, longest)), np.append(weight, np.zeros(short, np.int64))
    return distance.reshape(-1, each), weight.reshape(-1, each)


def _signed_bits(values: NDArray[np.int64]) -> int:
    """Of the narrowest signed number that holds every weight, and a zero."""
    least, most = min(0, int(values.min())), max(0, int(values.max()))
    return max((-least - 1).bit_length() if least else 0, most.bit_length()) + 1


def _parts(columns: NDArray[np.int64], most: int) -> int | None:
    """Into how many parts a column of rows [out, columns, taps] goes so that every sum fits 16 bits; 0: whole rows do,
    None: no such number."""
    signs = np.maximum(columns, 0), np.maximum(-columns, 0)
    if max(int(sign.sum((1, 2)).max()) for sign in signs) * most < 1 << 15:
        return 0
    for parts in PARTS:
        if columns.shape[1] * parts > 1 and columns.shape[2] % parts == 0:
            apart = [sign.reshape(len(sign), -1, columns.shape[2] // parts).sum(-1) for sign in signs]
            if max(int(one.max()) for one in apart) * most < 1 << 15:
                return parts
    return None


def _wide(values: NDArray[np.int64], each: int) -> Entries:
    """Of two entries the distances in a byte, each before its weight: distances, weight, weight; or of four entries the
    distances in two bytes, then their weights, and groups end with rows."""
    distance, weight = _gaps(values, 15, each if each == 4 else 1)
    count = len(distance)
    distance, weight = _filled(distance, weight, each, 15)
    stream = np.concatenate([distance[:, 0::2] | (distance[:, 1::2] << 4), weight & 255], 1).reshape(-1)
    return Entries(stream.astype(np.uint8), 4, 8, WIDE, 0, count)


def _words(values: NDArray[np.int64], bits: int, gap: int, parts: int) -> Entries:
    distance, weight = _gaps(values, (1 << gap) - 1)
    return Entries(_packed(distance, weight, gap, bits), gap, bits, WORDS, parts, len(distance))


def _ended(values: NDArray[np.int64], bits: int, gap: int) -> Entries:
    """Row by row; behind each an entry of distance 0 and weight 1, which is no entry of zeros as a used up word is."""
    distances, digits = [], []
    for row in values.reshape(len(values), 1, -1):
        places = np.flatnonzero(row)
        distance, weight = _gaps(row[:, : places[-1] + 1], (1 << gap) - 1) if len(places) else (places, places)
        kept = int(np.flatnonzero(weight)[-1]) + 1 if len(places) else 0  # without what leads beyond the row
        distances += [distance[:kept], np.zeros(1, np.int64)]
        digits += [weight[:kept], np.ones(1, np.int64)]
    count = sum(map(len, distances)) - len(values)
    one_more = np.ones(1, np.int64)  # the word of the last end is not used up by it: nothing beyond is read
    distance, weight = np.concatenate([*distances, one_more]), np.concatenate([*digits, one_more])
    return Entries(_packed(distance, weight, gap, bits), gap, bits, ENDED, 0, count)


def _packed(distance: NDArray[np.int64], weight: NDArray[np.int64], gap: int, bits: int) -> NDArray[np.uint32]:
    """Words of entries of gap + bits bits, the first in the lowest."""
    width = gap + bits
    each = 32 // width
    distance, weight = _filled(distance, weight, each, (1 << gap) - 1)
    entry = (distance | ((weight & ((1 << bits) - 1)) << gap)).astype(np.uint64)
    return (entry << (np.arange(each, dtype=np.uint64) * np.uint64(width))).sum(1).astype(np.uint32)


def _gaps(values: NDArray[np.int64], longest: int, group: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of every entry, its distance (1 .. ``longest``) and its weight; the last ones lie beyond the last row, which ends
    it. group: entries of one row fill up so many, with entries of distance and weight 0."""
    flat = values.reshape(-1)
    places = np.flatnonzero(flat)
    steps = np.diff(places, prepend=-1)
    fillers = (steps - 1) // longest
    beyond = (flat.size - 1 - (int(places[-1]) if len(places) else -1)) // longest + 1
    total = len(places) + int(fillers.sum())
    at = np.cumsum(fillers + 1) - 1
    distance, weight = np.full(total + beyond, longest, np.int64), np.zeros(total + beyond, np.int64)
    distance[at], weight[at] = (steps - 1) % longest + 1, flat[places]
    if group == 1:
        return distance, weight
    row = (np.cumsum(distance) - 1) // (flat.size // len(values))
    last = np.flatnonzero(np.diff(row, append=row[-1] + 1)) + 1  # where each row that has entries ends
    short = -np.diff(last, prepend=0) % group
    where = np.repeat(last, short)
    return np.insert(distance, where, 0), np.insert(weight, where, 0)


def true_bytes(conv: Conv) -> float:
    """Bits per weight, or a mask bit per weight and the bits of each weight that is not zero."""
    size, nonzero = conv.weight.size, int(np.count_nonzero(conv.weight))
    return min(size * conv.bits, size + nonzero * conv.bits) / 8
