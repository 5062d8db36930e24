"""What a tensor of the file is: where a grid's codes lie in int8, and in which order the axes are."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from flatcompress.onnx_export.lower.integer import Grid

LOW, HIGH = -128, 127


@dataclass(frozen=True)
class Place:
    """``stored = code - shift``, int8, which ends at the grid's highest code: what is above saturates.

    ``relu``: the lowest code stands for 0, which a fused ReLU limits to. ``floor``, ``ceiling``: int8 limits that an
    operator of their own has to keep, where neither the type nor a ReLU does.
    """

    shift: int
    zero: int
    relu: bool = False
    floor: int | None = None
    ceiling: int | None = None


def place(grid: Grid) -> Place:
    """Where a grid goes, with as few operators that limit codes as can be."""
    inside = grid.low <= grid.zero_point <= grid.high
    shift = grid.high - HIGH if inside else 128
    low, high, zero = grid.low - shift, grid.high - shift, grid.zero_point - shift
    relu = inside and low == zero > LOW
    floor = low if low > LOW else None
    return Place(shift, zero, relu, floor, high if high < HIGH else None)


@dataclass(frozen=True)
class Value:
    """A tensor of the file. ``shape``: as torch has it, for one sample. ``last``: its channels lie last in the file,
    and a [B, C, T] is [B, 1, T, C] there. ``open_axes``: of ``shape``, those that follow the batch. ``grid`` and
    ``shift``: of codes, ``int8 = code - shift``; without a grid the values are real.
    """

    tensor: int
    shape: tuple[int, ...]
    open_axes: frozenset[int] = frozenset((0,))
    last: bool = False
    grid: Grid | None = None
    shift: int = 0

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape in the file."""
        return stored(self.shape, self.last)


def stored(shape: tuple[int, ...], last: bool) -> tuple[int, ...]:
    """A shape as it is in the file."""
    if not last:
        return shape
    batch, channels, *space = shape
    return (batch, *[1] * (2 - len(space)), *space, channels)


def stored_axes(axes: Collection[int], rank: int, last: bool) -> frozenset[int]:
    """Axes of torch's order as they are in the file."""
    if not last:
        return frozenset(axes)
    moved = {0: 0, 1: 3, 2: 1 if rank == 4 else 2, 3: 2}
    return frozenset(moved[axis] for axis in axes)
