"""Integer weights at their true width: plain digits, bitmask + non-zeros, N:M positions + values.

Everything here is numpy; `digits.py` says how a stream of digits lies in bytes, `unpack.py` writes the ONNX sub-graph
that undoes it. A mask may be one of two levels: a bit for every group of two, four or eight weights, and which of them
for the groups that have any; at 80 % zeros that takes 0.79 bits a weight instead of one (the entropy is 0.72). N:M
stores which of the C(M, N) sets of positions each group has: 2.67 bits for 2:4, instead of the four bits of a mask.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatcompress.errors import UserError
from flatcompress.onnx_export.pack.digits import bits, stored_bytes

GROUPS = (2, 4, 8, 16)  # the M of N:M
MOST_SETS = 128
MASK_GROUPS = (2, 4, 8)  # the m of a mask of two levels
MASKED = ("mask", "groups")

# A sparse encoding costs a handful of extra graph nodes and load time; below this gain it is not worth them.
WORTH_BYTES = 128
WORTH_SHARE = 0.02
# About what the sub-graph of one pool takes.
POOL_BYTES = {"dense": 350, "mask": 650, "groups": 1000, "nm": 700}


@dataclass(frozen=True)
class Encoding:
    """How one integer tensor is stored. Tensors with equal encodings share one pool and one unpack sub-graph.

    ``kind`` is dense, mask, groups (a mask of two levels, with a bit for every ``m`` values in the upper) or nm; a
    stored value is one of the ``radix`` integers from ``low`` on, zero left out where a mask tells it. ``nm`` keeps
    ``n`` of every ``m`` consecutive values; ``channels_last`` says that axis 1 was moved to the end before grouping.
    Unpacked values are multiplied by ``2**headroom`` (see `graph.headroom`).
    """

    kind: str
    low: int
    radix: int
    n: int = 0
    m: int = 0
    channels_last: bool = False
    headroom: int = 0

    @property
    def label(self) -> str:
        """For people: "4 bit", "4 bit + mask", "4 bit 1:4"."""
        ends = {"dense": "", "mask": " + mask", "groups": " + mask of 2 levels", "nm": f" {self.n}:{self.m}"}
        return f"{round(bits(self.radix), 2):g} bit" + ends[self.kind]

    @property
    def masked(self) -> bool:
        """Whether a mask tells where zeros are, so that no value is one."""
        return self.kind in MASKED

    def alphabet(self) -> NDArray[np.int64]:
        """The integers that digits 0, 1, .. stand for, before headroom."""
        span = np.arange(self.low, self.low + self.radix + self.masked)
        return span[span != 0] if self.masked else span

    def positions(self) -> NDArray[np.int64]:
        """[C(m, n), n]: the positions that each set stands for."""
        return np.array(list(itertools.combinations(range(self.m), self.n)), np.int64)


def row_signs(values: NDArray[np.integer], bits: int) -> NDArray[np.int8] | None:
    """Signs [out] that bring every row of [out, ...] back to the signed ``bits``-bit grid, where that saves bytes.

    A BatchNorm with a negative gamma turns a channel's -2**(bits-1) into +2**(bits-1), which a wider range for the
    whole tensor would have to pay for; a sign per channel, multiplied after unpacking, is cheaper.
    """
    half = 1 << (bits - 1)
    rows = values.reshape(values.shape[0], -1) if values.ndim > 1 else values.reshape(1, -1)
    if values.ndim < 2 or values.size == 0 or int(rows.max()) != half:
        return None
    turned = rows.max(axis=1) == half
    if (rows[turned] <= -half).any() or rows.min() < -half:
        return None
    signs = np.where(turned, -1, 1).astype(np.int8)
    saved = best_bytes(values, bits) - best_bytes(rows * signs.reshape(-1, 1), bits)
    return signs if saved > WORTH_BYTES + rows.shape[0] / 8 else None


def grid_bits(values: NDArray[np.integer], bits: int) -> int:
    """The bits of a signed grid, at least ``bits``, that holds every value: a flipped -8 needs five."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    return next(width for width in range(bits, 9) if -(1 << (width - 1)) <= low and high < 1 << (width - 1))


def theoretical_bytes(values: NDArray[np.integer], bits: int) -> float:
    """The information-theoretic size: ``bits`` per weight, or a mask bit per weight and ``bits`` per non-zero."""
    return min(values.size * bits, values.size + int(np.count_nonzero(values)) * bits) / 8


def grouped(values: NDArray[np.integer], m: int, channels_last: bool) -> NDArray[np.integer] | None:
    """``values`` as [groups, m] of consecutive elements, or None where ``m`` does not divide the grouped axis."""
    moved = np.moveaxis(values, 1, -1) if channels_last else values
    run = moved.shape[-1] if channels_last else int(np.prod(moved.shape[1:], dtype=np.int64))
    if values.size == 0 or run % m:
        return None
    return np.ascontiguousarray(moved).reshape(-1, m)


def _grouped_mask(mask: NDArray[Any], m: int) -> NDArray[Any]:
    """A flat mask as rows of ``m``, filled up with zeros."""
    rows = np.zeros(-(-mask.size // m) * m, mask.dtype)
    rows[: mask.size] = mask
    return rows.reshape(-1, m)


@dataclass(frozen=True)
class Statistics:
    """What decides how many bytes an encoding of a tensor takes.

    ``used``: of every group size, the groups with a non-zero. ``sets``: of every (m, channels_last) that divides the
    tensor, the most non-zeros a group of m has.
    """

    bits: int
    size: int
    nonzero: int
    low: int
    high: int
    used: dict[int, int]
    sets: dict[tuple[int, bool], int]
    headroom: int = 0

    @classmethod
    def of(cls, values: NDArray[np.integer], bits: int, headroom: int = 0) -> Statistics:
        """Look at an integer tensor whose grid has ``bits`` bits (2..8)."""
        if bits not in range(2, 9):
            raise UserError(f"bits {bits!r}: a weight has 2 to 8 bits.")
        low, high = (min(0, int(values.min())), max(0, int(values.max()))) if values.size else (0, 0)
        mask = values.reshape(-1) != 0
        used = {m: int(_grouped_mask(mask, m).any(axis=1).sum()) for m in MASK_GROUPS}
        sets = {}
        for m in GROUPS:
            for last in sorted({False, values.ndim > 2}):
                groups = grouped(values, m, last)
                if groups is not None:
                    sets[m, last] = int(np.count_nonzero(groups, axis=1).max())
        return cls(bits, values.size, int(mask.sum()), low, high, used, sets, headroom)

    def fits(self, encoding: Encoding) -> bool:
        """Whether the encoding holds every value."""
        held = encoding.low <= self.low and self.high < encoding.low + encoding.radix + encoding.masked
        if encoding.kind != "nm":
            return held and encoding.headroom == self.headroom
        most = self.sets.get((encoding.m, encoding.channels_last), encoding.m)
        return held and encoding.headroom == self.headroom and most <= encoding.n

    def stored(self, encoding: Encoding) -> int:
        """Bytes in ``encoding``, without the graph around them."""
        if encoding.kind == "dense":
            return stored_bytes(self.size, encoding.radix)
        if encoding.kind == "nm":
            groups = self.size // encoding.m
            sets = stored_bytes(groups, math.comb(encoding.m, encoding.n))
            return stored_bytes(groups * encoding.n, encoding.radix) + sets
        total = stored_bytes(self.nonzero, encoding.radix)
        if encoding.kind == "mask":
            return total + stored_bytes(self.size, 2)
        groups, patterns = -(-self.size // encoding.m), (1 << encoding.m) - 1
        return total + stored_bytes(groups, 2) + stored_bytes(self.used[encoding.m], patterns)

    def candidates(self) -> Iterator[Encoding]:
        """Every encoding that holds the values, the simplest first."""
        yield self._with_span("dense", self.size)
        if self.nonzero:
            yield self._with_span("mask", self.nonzero)
            for m in MASK_GROUPS:
                yield replace(self._with_span("groups", self.nonzero), m=m)
        for (m, last), n in self.sets.items():
            if 0 < n < m and math.comb(m, n) <= MOST_SETS:
                yield replace(self._with_span("nm", self.size // m * n), n=n, m=m, channels_last=last)

    def _with_span(self, kind: str, count: int) -> Encoding:
        """The range for ``count`` digits: the grid's own, or a narrower one that holds the values where it saves bytes.

        Signed grids of fewer bits come before the exact range, so that layers fall into few pools.
        """
        halves = [1 << k for k in range(self.bits - 1, -1, -1)]
        spans = [(-half, half - 1) for half in halves if -half <= self.low and self.high < half]
        sized = []
        for first, last in [*spans, (self.low, max(self.high, self.low + 1))]:
            radix = max(2, last - first + (kind not in MASKED))
            sized.append((stored_bytes(count, radix), first, radix))
        best = sized[0]
        for candidate in sized[1:]:
            if candidate[0] + WORTH_BYTES < best[0]:
                best = candidate
        return Encoding(kind, best[1], best[2], headroom=self.headroom)

    def choose(self) -> Encoding:
        """The smallest encoding, simpler ones first where there is little in it."""
        every = self.candidates()
        best = next(every)
        for candidate in every:
            before = self.stored(best)
            if self.stored(candidate) + max(WORTH_BYTES, WORTH_SHARE * before) < before:
                best = candidate
        return best


def choose(values: NDArray[np.integer], bits: int) -> Encoding:
    """The smallest encoding of an integer tensor whose grid has ``bits`` bits (2..8).

    >>> choose(np.arange(-8, 8), 4).label, choose(np.eye(64, dtype=np.int8), 4).label
    ('4 bit', '4 bit + mask of 2 levels')
    """
    return Statistics.of(values, bits).choose()


def best_bytes(values: NDArray[np.integer], bits: int) -> int:
    """Bytes of a tensor in its smallest encoding."""
    found = Statistics.of(values, bits)
    return found.stored(found.choose())


def choose_together(tensors: Mapping[str, Statistics]) -> dict[str, Encoding]:
    """An encoding for each of several tensors that are stored in one file.

    Every encoding in use costs a sub-graph. One that saves less than that over the others in use is given up.
    """
    chosen = {name: found.choose() for name, found in tensors.items()}
    given_up: set[Encoding] = set()
    while True:
        moves = [move for move in map(partial(_without, tensors, chosen), set(chosen.values()) - given_up) if move]
        if not moves:
            return chosen
        loss, least, moved = min(moves, key=lambda move: (move[0], str(move[1])))
        if loss >= 0:
            return chosen
        chosen |= moved
        given_up.add(least)


def _without(
    tensors: Mapping[str, Statistics], chosen: Mapping[str, Encoding], encoding: Encoding
) -> tuple[float, Encoding, dict[str, Encoding]] | None:
    """What it costs to store what ``encoding`` stores by other encodings in use, less its sub-graph; None: cannot."""
    others = sorted(set(chosen.values()) - {encoding}, key=str)
    loss, moved = -float(POOL_BYTES[encoding.kind]), {}
    for name in (name for name, used in chosen.items() if used == encoding):
        found = tensors[name]
        fitting = [other for other in others if found.fits(other)]
        if not fitting:
            return None
        moved[name] = min(fitting, key=found.stored)
        loss += found.stored(moved[name]) - found.stored(encoding)
    return loss, encoding, moved


@dataclass(frozen=True)
class Stored:
    """Streams of digits: ``values``; ``marks``: mask bits, or of N:M the set of each group; ``patterns``: of a mask of
    two levels, the bits of each group that has any, less one.
    """

    values: NDArray[np.int64]
    marks: NDArray[np.int64] | None = None
    patterns: NDArray[np.int64] | None = None


def ordered(values: NDArray[np.integer], encoding: Encoding) -> NDArray[np.integer]:
    """One tensor's values in the order they are stored in, flat."""
    return (np.moveaxis(values, 1, -1) if encoding.channels_last else values).reshape(-1)


def encode(flat: NDArray[np.integer], encoding: Encoding) -> Stored:
    """The digits to store for `ordered` values. N:M keeps exactly ``n`` positions of each group."""
    wide = flat.astype(np.int64)
    if encoding.kind == "nm":
        return _encode_sets(wide, encoding)
    kept = wide[wide != 0] if encoding.masked else wide
    values = kept - encoding.low - (kept > 0) * encoding.masked
    if not encoding.masked:
        return Stored(values)
    mask = (wide != 0).astype(np.int64)
    if encoding.kind == "mask":
        return Stored(values, mask)
    patterns = _grouped_mask(mask, encoding.m) @ (1 << np.arange(encoding.m))
    return Stored(values, (patterns != 0).astype(np.int64), patterns[patterns != 0] - 1)


def _encode_sets(flat: NDArray[np.int64], encoding: Encoding) -> Stored:
    groups = flat.reshape(-1, encoding.m)
    # Non-zeros first and in order; the positions of zeros fill groups that have fewer than n.
    index = np.sort(np.argsort(groups == 0, axis=1, kind="stable")[:, : encoding.n], axis=1)
    values = np.take_along_axis(groups, index, axis=1).reshape(-1) - encoding.low
    number = np.zeros(1 << encoding.m, np.int64)  # of each set, looked up by its bits
    number[(1 << encoding.positions()).sum(axis=1)] = np.arange(math.comb(encoding.m, encoding.n))
    return Stored(values, number[(1 << index).sum(axis=1)])
