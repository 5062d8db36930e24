"""Emitters that pick, place or make values: gather and scatter, indices, flips, triangles, filled tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from flatcompress.errors import UserError
from flatcompress.onnx_export.emit.values import (
    as_shape_of,
    as_type,
    axis_of,
    fixed,
    numpy_type,
    rank_of,
    several,
    shape_of,
    sizes,
    type_of,
)
from flatcompress.onnx_export.emit.writer import FunctionEmitter, Writer

aten = torch.ops.aten
_FIRST = -(1 << 63)


def _gather(w: Writer, node: fx.Node, x: fx.Node, dim: int, index: fx.Node, **_: Any) -> str:
    return w.builder.op("GatherElements", [w.tensor(x), w.tensor(index)], axis=axis_of(x, dim))


def _scatter(reduction: str = "none") -> FunctionEmitter:
    """ScatterElements; opset 16 brought sums and products."""

    def emit(w: Writer, node: fx.Node, x: fx.Node, dim: int, index: fx.Node, source: Any, **_: Any) -> str:
        b, dtype = w.builder, type_of(node)
        if isinstance(source, fx.Node):
            values = _cut_to(w, source, index, dtype)
        else:
            values = b.op("Expand", [as_type(w, source, dtype), b.op("Shape", [w.tensor(index)])])
        extra: dict[str, Any] = {}
        if reduction != "none":
            b.need(16)
            extra = {"reduction": reduction}
        return b.op("ScatterElements", [as_type(w, x, dtype), w.tensor(index), values], axis=axis_of(x, dim), **extra)

    return emit


def _cut_to(w: Writer, source: fx.Node, index: fx.Node, dtype: torch.dtype) -> str:
    """torch reads as much of the source as the index has; ONNX wants them equal."""
    name, b = as_type(w, source, dtype), w.builder
    if shape_of(source)[1:] == shape_of(index)[1:] and rank_of(source) > 1:
        return name
    if shape_of(source) == shape_of(index):
        return name
    axes = list(range(rank_of(index)))
    return b.op("Slice", [name, b.ints([0] * len(axes)), b.op("Shape", [w.tensor(index)]), b.ints(axes)])


def _index(w: Writer, node: fx.Node, x: fx.Node, indices: Sequence[Any]) -> str:
    """One tensor of whole numbers is a Gather; several, one after another from the front, a GatherND."""
    chosen = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if any(type_of(i) in (torch.bool, torch.uint8) for _, i in chosen):
        raise UserError("an index by truth values gives a size that depends on the data.")
    if len(chosen) == 1:
        axis, index = chosen[0]
        return w.builder.op("Gather", [w.tensor(x), w.tensor(index)], axis=axis)
    if [axis for axis, _ in chosen] != list(range(len(chosen))):
        raise UserError("an index of several tensors that skips the first dimensions has no ONNX form here.")
    return _gather_nd(w, x, [i for _, i in chosen])


def _gather_nd(w: Writer, x: fx.Node, indices: list[fx.Node]) -> str:
    b = w.builder
    names = [w.tensor(i) for i in indices]
    total = names[0]
    for name in names[1:]:  # the sum has the shape they broadcast to
        total = b.op("Add", [total, name])
    shape, columns = b.op("Shape", [total]), []
    for name in names:
        columns.append(b.op("Unsqueeze", [b.op("Expand", [name, shape]), b.ints([-1])]))
    return b.op("GatherND", [w.tensor(x), b.op("Concat", columns, axis=-1)])


def _flip(w: Writer, node: fx.Node, x: fx.Node, over: Sequence[int]) -> str:
    b, axes = w.builder, [axis_of(x, d) for d in over]
    if not axes:
        return w.tensor(x)
    ends = [b.ints([-1] * len(axes)), b.ints([_FIRST + 1] * len(axes))]
    return b.op("Slice", [w.tensor(x), *ends, b.ints(axes), b.ints([-1] * len(axes))])


def _triangle(upper: int) -> FunctionEmitter:
    def emit(w: Writer, node: fx.Node, x: fx.Node, diagonal: int = 0) -> str:
        return w.builder.op("Trilu", [w.tensor(x), w.builder.ints(diagonal)], upper=upper)

    return emit


def _one_hot(w: Writer, node: fx.Node, index: fx.Node, classes: int = -1) -> str:
    if classes < 0:
        raise UserError("one_hot without num_classes gives a size that depends on the data.")
    b = w.builder
    return b.op("OneHot", [w.tensor(index), b.ints([classes]), b.ints([0, 1])])


def _filled(w: Writer, node: fx.Node, shape: Sequence[Any], value: Any) -> str:
    constant = np.asarray(value, numpy_type(w, type_of(node)))
    if not any(isinstance(s, fx.Node) for s in shape):
        return w.builder.constant(np.full(list(shape), constant))
    return w.builder.op("Expand", [w.builder.constant(constant), sizes(w, shape)])


def _full(w: Writer, node: fx.Node, shape: Sequence[Any], value: Any, **_: Any) -> str:
    return _filled(w, node, shape, value)


def _made_of(value: int) -> FunctionEmitter:
    def emit(w: Writer, node: fx.Node, shape: Sequence[Any], *_: Any, **__: Any) -> str:
        return _filled(w, node, shape, value)

    return emit


def _new(value: int) -> FunctionEmitter:
    def emit(w: Writer, node: fx.Node, x: fx.Node, shape: Sequence[Any], *_: Any, **__: Any) -> str:
        return _filled(w, node, shape, value)

    return emit


def _new_full(w: Writer, node: fx.Node, x: fx.Node, shape: Sequence[Any], value: Any, **_: Any) -> str:
    return _filled(w, node, shape, value)


def _like(value: int) -> FunctionEmitter:
    def emit(w: Writer, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> str:
        return _full_like(w, node, x, value)

    return emit


def _full_like(w: Writer, node: fx.Node, x: fx.Node, value: Any, **_: Any) -> str:
    constant = w.builder.constant(np.asarray(value, numpy_type(w, type_of(node))))
    return w.builder.op("Expand", [constant, w.builder.op("Shape", [w.tensor(x)])])


def _scalar(w: Writer, node: fx.Node, value: Any, **_: Any) -> str:
    if isinstance(value, fx.Node):  # a size, which is a vector of one
        return w.builder.op("Squeeze", [as_type(w, value, type_of(node))])
    return as_type(w, value, type_of(node))


def _arange(w: Writer, node: fx.Node, *bounds: Any, **_: Any) -> str:
    """Positions; a bound that is a size is known only when the file runs."""
    dtype, b = type_of(node), w.builder
    start, end, step = {1: (0, *bounds, 1), 2: (*bounds, 1)}.get(len(bounds), bounds)
    if not any(isinstance(v, fx.Node) for v in (start, end, step)):
        return b.constant(np.arange(start, end, step).astype(numpy_type(w, dtype)))
    given = [
        b.op("Squeeze", [as_type(w, v, dtype)]) if isinstance(v, fx.Node) else as_type(w, v, dtype)
        for v in (start, end, step)
    ]
    return b.op("Range", given)


def _repeat_interleave(w: Writer, node: fx.Node, x: fx.Node, times: int, dim: int | None = None, **_: Any) -> str:
    """Every value ``times`` times in a row: a new dimension, repeated, merged into the one before."""
    if dim is None or not isinstance(times, int):
        raise UserError("repeat_interleave takes one number and a dimension here.")
    b, axis, rank = w.builder, axis_of(x, dim), rank_of(x)
    wide = b.op("Unsqueeze", [w.tensor(x), b.ints([axis + 1])])
    tiled = b.op("Tile", [wide, b.ints([times if a == axis + 1 else 1 for a in range(rank + 1)])])
    return b.op("Reshape", [tiled, as_shape_of(w, node) if axis else b.ints([-1, *shape_of(node)[1:]])])


def _unfold(w: Writer, node: fx.Node, x: fx.Node, dim: int, size: int, step: int) -> str:
    """Sliding windows along a dimension, as a Gather of their positions; the window becomes the last dimension."""
    axis, rank = axis_of(x, dim), rank_of(x)
    length = fixed(x, axis, "unfold")
    starts = np.arange(0, length - size + 1, step)
    made = w.builder.op("Gather", [w.tensor(x), w.builder.ints(starts[:, None] + np.arange(size))], axis=axis)
    order = [a for a in range(rank + 1) if a != axis + 1] + [axis + 1]
    return w.builder.op("Transpose", [made], perm=order)


def _im2col(w: Writer, node: fx.Node, x: fx.Node, kernel: Any, dilation: Any, padding: Any, stride: Any) -> str:
    """F.unfold: every window of an image as a column, by a Gather along height and one along width."""
    b, shape = w.builder, shape_of(x)
    k, d, p, s = (several(v, 2) for v in (kernel, dilation, padding, stride))
    made, positions = w.tensor(x), []
    if any(p):
        made = b.op("Pad", [made, b.ints([0, 0, *p, 0, 0, *p])])
    for axis in (2, 3):
        i = axis - 2
        length = fixed(x, axis, "unfold") + 2 * p[i]
        count = (length - d[i] * (k[i] - 1) - 1) // s[i] + 1
        positions.append(np.arange(k[i])[:, None] * d[i] + np.arange(count) * s[i])
    made = b.op("Gather", [made, b.ints(positions[0])], axis=2)  # [B, C, kh, H', W]
    made = b.op("Gather", [made, b.ints(positions[1])], axis=4)  # [B, C, kh, H', kw, W']
    made = b.op("Transpose", [made], perm=[0, 1, 2, 4, 3, 5])
    return b.op("Reshape", [made, b.ints([0, shape[1] * k[0] * k[1], -1])])


INDEXING: dict[Any, FunctionEmitter] = {
    aten.gather.default: _gather,
    **dict.fromkeys((aten.scatter.src, aten.scatter.value), _scatter()),
    aten.scatter_add.default: _scatter("add"),
    aten.index.Tensor: _index,
    aten.flip.default: _flip,
    aten.tril.default: _triangle(0),
    aten.triu.default: _triangle(1),
    aten.one_hot.default: _one_hot,
    aten.full.default: _full,
    aten.zeros.default: _made_of(0),
    aten.ones.default: _made_of(1),
    aten.new_zeros.default: _new(0),
    aten.new_ones.default: _new(1),
    aten.new_full.default: _new_full,
    aten.full_like.default: _full_like,
    aten.zeros_like.default: _like(0),
    aten.ones_like.default: _like(1),
    aten.scalar_tensor.default: _scalar,
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), _arange),
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.unfold.default: _unfold,
    aten.im2col.default: _im2col,
}
