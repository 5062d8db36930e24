"""Writers of torch's operators in a lowered graph: what moves values, and arithmetic on real ones."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from flatcompress.onnx_export.litert.layers import VALID, _padded
from flatcompress.onnx_export.litert.values import Value, stored_axes
from flatcompress.onnx_export.litert.writer import Emit, Writer, refuse

aten = torch.ops.aten


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _source(w: Writer, node: fx.Node) -> Value:
    return w.value(node.args[0], node)


# --- moves --------------------------------------------------------------------------------------------------------


def _reshape(w: Writer, node: fx.Node) -> Value:
    """To the shape that the trace has for the result."""
    x = w.first(_source(w, node))
    out = w.make(node, grid=x.grid)
    w.flat.op("RESHAPE", [x.tensor, w.shape_of(out)], [out.tensor], 1, "ReshapeOptions")
    return out


def _permuted(w: Writer, node: fx.Node, order: Sequence[int]) -> Value:
    x = w.first(_source(w, node))
    out = w.make(node, grid=x.grid)
    w.transpose(x, out, [axis % len(x.shape) for axis in order])
    return out


def _permute(w: Writer, node: fx.Node) -> Value:
    return _permuted(w, node, node.args[1])  # type: ignore[arg-type]


def _transpose(w: Writer, node: fx.Node) -> Value:
    order = list(range(len(node.meta["shape"])))
    dims: Any = node.args[1:3]
    a, b = (int(axis) % len(order) for axis in dims)
    order[a], order[b] = order[b], order[a]
    return _permuted(w, node, order)


def _slices(w: Writer, node: fx.Node, x: Value, axis: int, sizes: Sequence[int]) -> list[Value]:
    """Parts along an axis of torch's order, one after the other."""
    if axis in x.open_axes:
        raise refuse(node, "a part of a size that follows the batch")
    found, start = [], 0
    for size in sizes:
        shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
        out = w.moved(x, shape, x.open_axes, x.last)
        (where,), axes = stored_axes({axis}, len(shape), x.last), stored_axes(x.open_axes, len(shape), x.last)
        begin = [start if a == where else 0 for a in range(len(out.stored))]
        length = [-1 if a in axes else s for a, s in enumerate(out.stored)]
        ends = [w.flat.constant(np.array(values, np.int32)) for values in (begin, length)]
        w.flat.op("SLICE", [x.tensor, *ends], [out.tensor], 1 if x.grid is None else 2, "SliceOptions")
        found.append(out)
        start += size
    return found


def _without(w: Writer, x: Value, axis: int) -> Value:
    """One axis of length 1 less."""
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    axes = frozenset(a - (a > axis) for a in x.open_axes)
    out = w.moved(x, shape, axes, False)
    w.flat.op("RESHAPE", [x.tensor, w.shape_of(out)], [out.tensor], 1, "ReshapeOptions")
    return out


def _unbind(w: Writer, node: fx.Node) -> list[Value]:
    x = w.first(_source(w, node))
    axis = int(_argument(node, 1, "dim", 0)) % len(x.shape)
    return [_without(w, part, axis) for part in _slices(w, node, x, axis, [1] * x.shape[axis])]


def _slice(w: Writer, node: fx.Node) -> Value:
    x = _source(w, node)
    axis = int(_argument(node, 1, "dim", 0)) % len(x.shape)
    if axis in x.open_axes or _argument(node, 4, "step", 1) != 1:
        raise refuse(node, "every second value of an axis, or a part of the batch")
    size = x.shape[axis]
    start, stop, _ = slice(_argument(node, 2, "start"), _argument(node, 3, "end")).indices(size)
    sizes = [start, stop - start]
    return _slices(w, node, x, axis, sizes if start else sizes[1:])[-1]


def _split(w: Writer, node: fx.Node) -> list[Value]:
    x, given = _source(w, node), node.args[1]
    axis = int(_argument(node, 2, "dim", 0)) % len(x.shape)
    if node.target is aten.chunk.default:
        given = -(-x.shape[axis] // int(given))  # type: ignore[arg-type, operator]
    if isinstance(given, int):
        sizes = [min(given, x.shape[axis] - start) for start in range(0, x.shape[axis], given)]
    else:
        sizes = list(given)  # type: ignore[arg-type]
    return _slices(w, node, x, axis, sizes)


def _select(w: Writer, node: fx.Node) -> Value:
    x = w.first(_source(w, node))
    axis, index = int(node.args[1]) % len(x.shape), int(node.args[2])  # type: ignore[arg-type]
    before = index % x.shape[axis]
    part = _slices(w, node, x, axis, [before, 1] if before else [1])[-1]
    return _without(w, part, axis)


def _getitem(w: Writer, node: fx.Node) -> Any:
    return w.env[node.args[0]][node.args[1]]  # type: ignore[index]


def _cat(w: Writer, node: fx.Node) -> Value:
    """CONCATENATION; all parts lie on one grid."""
    parts = [w.value(part, node) for part in node.args[0]]  # type: ignore[union-attr]
    last = all(part.last for part in parts)
    parts = parts if last else [w.first(part) for part in parts]
    grids = {(part.grid, part.shift) for part in parts}
    if len(grids) > 1:
        parts = [w.real(part) for part in parts]
    rank, axis = len(parts[0].shape), int(_argument(node, 1, "dim", 0))
    axis %= rank
    (where,) = stored_axes({axis}, rank, last)
    out = w.make(node, last=last, grid=parts[0].grid)
    w.flat.op("CONCATENATION", [part.tensor for part in parts], [out.tensor], 1 if out.grid is None else 2,
              "ConcatenationOptions", axis=where)  # fmt: skip
    return out


def _two_dimensions(value: Any, default: Sequence[int]) -> tuple[int, int]:
    values = list(default) if value is None or value == [] else [value] if isinstance(value, int) else list(value)
    first, second = values * 2 if len(values) == 1 else values
    return int(first), int(second)


def _max_pool(w: Writer, node: fx.Node) -> Value:
    """MAX_POOL_2D of codes, padded with the lowest one where torch's padding is not LiteRT's."""
    x = w.last(_source(w, node))
    kernel = _two_dimensions(node.args[1], ())
    stride = _two_dimensions(_argument(node, 2, "stride"), kernel)
    pad = _two_dimensions(_argument(node, 3, "padding"), (0, 0))
    dilation, ceil = _two_dimensions(_argument(node, 4, "dilation"), (1, 1)), _argument(node, 5, "ceil_mode", False)
    if dilation != (1, 1) or ceil:
        raise refuse(node, "a max pooling with dilation or ceil_mode")
    if any(pad) and (x.grid is None or x.grid.low < x.grid.zero_point):
        raise refuse(node, "a padded max pooling of values below 0")  # PAD pads with 0
    x, padding = _padded(w, x, [(pad[0], pad[0]), (pad[1], pad[1])], kernel, stride, (1, 1))
    out = w.make(node, last=True, grid=x.grid)
    w.flat.op("MAX_POOL_2D", [x.tensor], [out.tensor], 1 if x.grid is None else 2, "Pool2DOptions", padding=padding,
              strideH=stride[0], strideW=stride[1], filterHeight=kernel[0], filterWidth=kernel[1])  # fmt: skip
    return out


# --- real values --------------------------------------------------------------------------------------------------


def _binary(kind: str) -> Emit:
    """An operator on two real values, or one and a number."""

    def emit(w: Writer, node: fx.Node) -> Value:
        if node.kwargs.get("alpha", 1) != 1:
            raise refuse(node, "a sum with alpha")
        a, b = (_operand(w, node, value) for value in node.args[:2])
        a, b = w.same_order(a, b) if a.shape and b.shape else (a, b)
        out = w.make(node, last=a.last or b.last)
        w.flat.op(kind, [a.tensor, b.tensor], [out.tensor], 1, f"{kind.capitalize()}Options")
        return out

    return emit


def _operand(w: Writer, node: fx.Node, value: Any) -> Value:
    if isinstance(value, int | float):
        return w.fixed(np.array(value, np.float32))
    return w.real(w.value(value, node))


def _unary(kind: str, options: str | None = None, **settings: Any) -> Emit:
    """An operator on one real value."""

    def emit(w: Writer, node: fx.Node) -> Value:
        return w.unary(kind, w.real(_source(w, node)), (), options, **settings)

    return emit


def _silu(w: Writer, node: fx.Node) -> Value:
    x = w.real(_source(w, node))
    gate, out = w.unary("LOGISTIC", x), w.like(x, None)
    w.flat.op("MUL", [x.tensor, gate.tensor], [out.tensor], 1, "MulOptions")
    return out


def _gelu(w: Writer, node: fx.Node) -> Value:
    tanh = node.kwargs.get("approximate", "none") == "tanh"
    return w.unary("GELU", w.real(_source(w, node)), (), "GeluOptions", approximate=tanh)


def _softmax(w: Writer, node: fx.Node) -> Value:
    x = w.first(w.real(_source(w, node)))
    if int(node.args[1]) % len(x.shape) != len(x.shape) - 1:  # type: ignore[arg-type]
        raise refuse(node, "a softmax over another axis than the last")
    return w.unary("SOFTMAX", x, (), "SoftmaxOptions", beta=1.0)


def _mean(w: Writer, node: fx.Node) -> Value:
    x = w.first(w.real(_source(w, node)))
    dims, keep = node.args[1], bool(_argument(node, 2, "keepdim", False))
    axes = sorted(int(d) % len(x.shape) for d in ([dims] if isinstance(dims, int) else dims))  # type: ignore[union-attr, arg-type]
    out = w.make(node)
    w.flat.op("MEAN", [x.tensor, w.flat.constant(np.array(axes, np.int32))], [out.tensor], 1, "ReducerOptions",
              keepDims=keep)  # fmt: skip
    return out


def _product(w: Writer, node: fx.Node) -> Value:
    a, b = (w.first(w.real(w.value(value, node))) for value in node.args[:2])
    out = w.make(node)
    w.flat.op("BATCH_MATMUL", [a.tensor, b.tensor], [out.tensor], 1, "BatchMatMulOptions")
    return out


def _size(w: Writer, node: fx.Node) -> None:
    """Sizes are known: what is made with them takes its shape from the trace."""


def _avg_pool(w: Writer, node: fx.Node) -> Value:
    x = w.last(w.real(_source(w, node)))
    kernel = _two_dimensions(node.args[1], ())
    stride = _two_dimensions(_argument(node, 2, "stride"), kernel)
    if any(_two_dimensions(_argument(node, 3, "padding"), (0, 0))) or _argument(node, 4, "ceil_mode", False):
        raise refuse(node, "a padded average pooling, or one with ceil_mode")
    out = w.make(node, last=True)
    w.flat.op("AVERAGE_POOL_2D", [x.tensor], [out.tensor], 1, "Pool2DOptions", padding=VALID, strideH=stride[0],
              strideW=stride[1], filterHeight=kernel[0], filterWidth=kernel[1])  # fmt: skip
    return out


RESHAPES = (aten.flatten.using_ints, aten.reshape.default, aten.view.default, aten.squeeze.default, aten.squeeze.dim,
            aten.squeeze.dims, aten.unsqueeze.default, aten.unflatten.int)  # fmt: skip
SIZES = (aten.sym_size.int, operator.add, operator.sub, operator.mul, operator.floordiv, math.trunc)

FUNCTIONS: dict[Any, Emit] = {
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(SIZES, _size),
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    operator.getitem: _getitem,
    aten.cat.default: _cat,
    aten.max_pool2d.default: _max_pool,
    aten.avg_pool2d.default: _avg_pool,
    aten.add.Tensor: _binary("ADD"),
    aten.sub.Tensor: _binary("SUB"),
    aten.mul.Tensor: _binary("MUL"),
    aten.div.Tensor: _binary("DIV"),
    aten.relu.default: _unary("RELU"),
    aten.relu6.default: _unary("RELU6"),
    aten.sigmoid.default: _unary("LOGISTIC"),
    aten.tanh.default: _unary("TANH"),
    aten.hardswish.default: _unary("HARD_SWISH", "HardSwishOptions"),
    aten.silu.default: _silu,
    aten.gelu.default: _gelu,
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten.mean.dim: _mean,
    aten.matmul.default: _product,
    aten.bmm.default: _product,
}
