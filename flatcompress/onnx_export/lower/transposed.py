"""A transposed convolution as a plain one: one channel per position inside a stride, put side by side afterwards.

Output position o of stride s and padding p reads kernel positions k with k = o + p (mod s) alone, so each of the s
remainders is a convolution of its own with every s-th kernel value, mirrored (sub-pixel convolution,
arXiv 1609.07009). onnxruntime has no integer kernel for a transposed convolution; for this it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SubPixel:
    """``pads`` of the plain convolution (torch's order), and what is cut off each spatial dimension afterwards."""

    strides: tuple[int, ...]
    pads: tuple[int, ...]
    cuts: tuple[tuple[int, int], ...]
    dilations: tuple[int, ...]


def plain(values: Tensor, module: Any) -> tuple[Tensor, SubPixel]:
    """From weights [out, in / groups, *kernel] the plain convolution's [out * prod(strides), in / groups, *taps]."""
    strides, dilations = list(module.stride), list(module.dilation)
    for axis, (stride, dilation) in enumerate(zip(strides, dilations)):
        if stride > 1 and dilation > 1:
            values, dilations[axis] = _spread(values, axis + 2, dilation), 1
    kernel, pads, cuts = list(values.shape[2:]), [], []
    for k, s, d, p, extra in zip(kernel, strides, dilations, module.padding, module.output_padding):
        taps = -(-k // s)
        reach = (k - 1) * d + 1
        more = max(0, -(-(reach + extra - p - s * _reach(taps, d)) // s))
        left = (taps - 1) * d
        pads.append((left, left + more))
        cuts.append((p, (_reach(taps, d) + more) * s + p - reach - extra))
    return _rearranged(values, strides), SubPixel(
        tuple(strides), tuple(amount for pair in reversed(pads) for amount in pair), tuple(cuts), tuple(dilations)
    )


def _reach(taps: int, dilation: int) -> int:
    return (taps - 1) * dilation + 1


def _spread(values: Tensor, axis: int, dilation: int) -> Tensor:
    """A dilated kernel with its zeros written out."""
    shape = list(values.shape)
    shape[axis] = (shape[axis] - 1) * dilation + 1
    wide = values.new_zeros(shape)
    wide[(slice(None),) * axis + (slice(None, None, dilation),)] = values
    return wide


def _rearranged(values: Tensor, strides: list[int]) -> Tensor:
    """k = t s + r: kernels of the taps t, mirrored, for every remainder r as a channel of its own."""
    rank = len(strides)
    for axis, stride in enumerate(strides):
        missing = -values.shape[axis + 2] % stride
        shape = list(values.shape)
        shape[axis + 2] = missing
        values = torch.cat([values, values.new_zeros(shape)], axis + 2)
    outs, ins = values.shape[:2]
    taps = [size // stride for size, stride in zip(values.shape[2:], strides)]
    split = values.reshape(outs, ins, *(n for pair in zip(taps, strides) for n in pair))
    split = split.flip([2 + 2 * axis for axis in range(rank)])
    order = [0, *(3 + 2 * axis for axis in range(rank)), 1, *(2 + 2 * axis for axis in range(rank))]
    return split.permute(order).reshape(-1, ins, *taps)
