"""Which place in its tensor every element of a value has, so that a move of elements is done on their numbers.

Reshapes, transpositions, slices and the like only name elements anew: run on a tensor of places instead of values,
they say where everything lies, and whoever reads it takes it from there, or has it moved (`loops`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flatcompress.onnx_export.c import ir

LOOPS = 6


@dataclass(eq=False)
class Placed:
    """A value of one sample: ``index`` [1, ...] says where in ``tensor`` each element lies."""

    tensor: ir.Tensor
    index: Tensor


def channels_last(shape: Sequence[int]) -> Tensor:
    """[1, C], [1, C, L] or [1, C, H, W] as convolutions store it. shape: without the batch."""
    channels, *spatial = shape
    return torch.arange(math.prod(shape)).reshape(1, *spatial, channels).movedim(-1, 1)


def in_order(shape: Sequence[int]) -> Tensor:
    """Elements that lie in the order of their indices. shape: without the batch."""
    return torch.arange(math.prod(shape)).reshape(1, *shape)


def whole(placed: Placed) -> bool:
    """Whether every element of the tensor is there, once."""
    tensor, index = placed.tensor, placed.index
    count = tensor.height * tensor.width * tensor.channels
    return index.numel() == count and bool((index.flatten().sort().values == torch.arange(count)).all())


def affine(index: Tensor) -> tuple[int, list[int]] | None:
    """(first place, stride of every dimension), or None where steps are not even."""
    first, strides = int(index.flatten()[0]), []
    for axis, size in enumerate(index.shape):
        strides.append(int(index.select(axis, 1).flatten()[0]) - first if size > 1 else 0)
    grids = torch.meshgrid(*(torch.arange(size) for size in index.shape), indexing="ij")
    even = torch.full_like(index, first)
    for grid, stride in zip(grids, strides):
        even += grid * stride
    return (first, strides) if torch.equal(even, index) else None


def loops(places: NDArray[np.int64]) -> tuple[int, list[tuple[int, int]]] | None:
    """Nested loops that visit ``places`` in order: (first place, (size, stride) from the outermost on), or None."""
    found: list[tuple[int, int]] = []
    first, left = int(places[0]), places
    while len(left) > 1:
        size, stride = _run(left)
        if size == 1 or len(found) == LOOPS:
            return None
        found.insert(0, (size, stride))
        left = left[::size]
    return first, found or [(1, 0)]


def _run(places: NDArray[np.int64]) -> tuple[int, int]:
    """The longest innermost loop: its size, which divides what is left, and its stride."""
    stride = int(places[1] - places[0])
    breaks = np.flatnonzero(np.diff(places) != stride)
    longest = int(breaks[0]) + 1 if len(breaks) else len(places)
    for size in range(longest, 1, -1):
        if len(places) % size == 0:
            grouped = places.reshape(-1, size)
            if np.array_equal(grouped, grouped[:, :1] + stride * np.arange(size)):
                return size, stride
    return 1, 0


def inverse(index: Tensor) -> NDArray[np.int64]:
    """Of each place, which element lies there, elements counted in order. index: of a whole tensor."""
    return np.argsort(index.flatten().numpy())
