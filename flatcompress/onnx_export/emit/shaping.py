"""Emitters for operators that move, cut or repeat values. They take real tensors and uint8 codes alike."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper
from torch import fx

from flatcompress.errors import UserError
from flatcompress.onnx_export.emit.writer import FunctionEmitter, Writer

aten = torch.ops.aten
_END = (1 << 63) - 1


def shape_of(node: Any) -> tuple[int, ...]:
    """A node's shape in the trace."""
    return tuple(node.meta["shape"])


def axis_of(node: Any, dim: int) -> int:
    """A dimension counted from the front."""
    return dim % max(1, len(shape_of(node)))


def dims(w: Writer, sizes: Sequence[Any]) -> str:
    """An int64 vector of sizes, some of which may be symbolic (one-element tensors)."""
    symbolic = [s for s in sizes if isinstance(s, fx.Node)]
    if len(symbolic) == 1 and -1 not in sizes:
        return w.builder.ints([-1 if isinstance(s, fx.Node) else s for s in sizes])
    if not symbolic:
        return w.builder.ints(list(sizes))
    parts = [w.env[s] if isinstance(s, fx.Node) else w.builder.ints([s]) for s in sizes]
    return w.builder.op("Concat", parts, axis=0)


def _sym_size(w: Writer, node: fx.Node, x: fx.Node, dim: int) -> str:
    shape = w.builder.op("Shape", [w.tensor(x)])
    return w.builder.op("Gather", [shape, w.builder.ints([axis_of(x, dim)])])


def _sizes(kind: str) -> FunctionEmitter:
    """Arithmetic on symbolic sizes."""

    def emit(w: Writer, node: fx.Node, a: Any, b: Any) -> str:
        names = [w.env[v] if isinstance(v, fx.Node) else w.builder.ints([v]) for v in (a, b)]
        return w.builder.op(kind, names)

    return emit


def _reshape(w: Writer, node: fx.Node, x: fx.Node, sizes: Sequence[Any]) -> str:
    return w.builder.op("Reshape", [w.tensor(x), dims(w, sizes)])


def _flatten(w: Writer, node: fx.Node, x: fx.Node, start_dim: int = 0, end_dim: int = -1) -> str:
    shape, start, end = shape_of(x), axis_of(x, start_dim), axis_of(x, end_dim)
    if start == 1 and end == len(shape) - 1:
        return w.builder.op("Flatten", [w.tensor(x)], axis=1)
    if start == 0:
        return w.builder.op("Reshape", [w.tensor(x), w.builder.ints([-1, *shape[end + 1 :]])])
    # 0 copies a dimension, so the batch stays dynamic
    return w.builder.op("Reshape", [w.tensor(x), w.builder.ints([0, *shape[1:start], -1, *shape[end + 1 :]])])


def _permute(w: Writer, node: fx.Node, x: fx.Node, order: Sequence[int]) -> str:
    return w.builder.op("Transpose", [w.tensor(x)], perm=[axis_of(x, d) for d in order])


def _transpose(w: Writer, node: fx.Node, x: fx.Node, first: int = 0, second: int = 1) -> str:
    order = list(range(len(shape_of(x))))
    a, b = axis_of(x, first), axis_of(x, second)
    order[a], order[b] = b, a
    return w.builder.op("Transpose", [w.tensor(x)], perm=order)


def _squeeze(w: Writer, node: fx.Node, x: fx.Node, dim: Any = None) -> str:
    shape = shape_of(x)
    chosen = range(1, len(shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    axes = [a for a in (axis_of(x, d) for d in chosen) if shape[a] == 1 and (a or dim is not None)]
    return w.builder.op("Squeeze", [w.tensor(x), w.builder.ints(axes)]) if axes else w.tensor(x)


def _unsqueeze(w: Writer, node: fx.Node, x: fx.Node, dim: int) -> str:
    return w.builder.op("Unsqueeze", [w.tensor(x), w.builder.ints([dim % (len(shape_of(x)) + 1)])])


def _slice(
    w: Writer, node: fx.Node, x: fx.Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> str:
    bounds = [
        w.env[v] if isinstance(v, fx.Node) else w.builder.ints([v]) for v in (start or 0, _END if end is None else end)
    ]
    axis, steps = w.builder.ints([axis_of(x, dim)]), w.builder.ints([step])
    return w.builder.op("Slice", [w.tensor(x), *bounds, axis, *([steps] if step != 1 else [])])


def _select(w: Writer, node: fx.Node, x: fx.Node, dim: int, index: int) -> str:
    return w.builder.op("Gather", [w.tensor(x), w.builder.ints(index)], axis=axis_of(x, dim))


def _index_select(w: Writer, node: fx.Node, x: fx.Node, dim: int, index: fx.Node) -> str:
    return w.builder.op("Gather", [w.tensor(x), w.tensor(index)], axis=axis_of(x, dim))


def _pieces(w: Writer, x: fx.Node, sizes: list[int], dim: int) -> list[str]:
    if len(sizes) == 1:
        return [w.tensor(x)]
    return w.builder.ops("Split", [w.tensor(x), w.builder.ints(sizes)], outputs=len(sizes), axis=dim)


def _unbind(w: Writer, node: fx.Node, x: fx.Node, dim: int = 0) -> list[str]:
    axis = axis_of(x, dim)
    pieces = _pieces(w, x, [1] * shape_of(x)[axis], axis)
    return [w.builder.op("Squeeze", [piece, w.builder.ints([axis])]) for piece in pieces]


def _split(w: Writer, node: fx.Node, x: fx.Node, size: int, dim: int = 0) -> list[str]:
    axis = axis_of(x, dim)
    total = shape_of(x)[axis]
    return _pieces(w, x, [min(size, total - start) for start in range(0, total, size)], axis)


def _split_sizes(w: Writer, node: fx.Node, x: fx.Node, sizes: Sequence[int], dim: int = 0) -> list[str]:
    return _pieces(w, x, list(sizes), axis_of(x, dim))


def _chunk(w: Writer, node: fx.Node, x: fx.Node, chunks: int, dim: int = 0) -> list[str]:
    return _split(w, node, x, -(-shape_of(x)[axis_of(x, dim)] // chunks), dim)


def _getitem(w: Writer, node: fx.Node, x: fx.Node, index: int) -> Any:
    return w.env[x][index]


def _cat(w: Writer, node: fx.Node, tensors: Sequence[fx.Node], dim: int = 0) -> str:
    return w.builder.op("Concat", [w.tensor(t) for t in tensors], axis=axis_of(node, dim))


def _stack(w: Writer, node: fx.Node, tensors: Sequence[fx.Node], dim: int = 0) -> str:
    axis = axis_of(node, dim)
    parts = [w.builder.op("Unsqueeze", [w.tensor(t), w.builder.ints([axis])]) for t in tensors]
    return w.builder.op("Concat", parts, axis=axis)


def _expand(w: Writer, node: fx.Node, x: fx.Node, sizes: Sequence[Any], implicit: bool = False) -> str:
    """Expand broadcasts both ways, so a kept size (-1) is a 1."""
    kept = [1 if isinstance(s, int) and s == -1 else s for s in sizes]
    symbolic = [s for s in kept if isinstance(s, fx.Node)]
    if not symbolic:
        return w.builder.op("Expand", [w.tensor(x), w.builder.ints(kept)])
    parts = [w.env[s] if isinstance(s, fx.Node) else w.builder.ints([s]) for s in kept]
    return w.builder.op("Expand", [w.tensor(x), w.builder.op("Concat", parts, axis=0)])


def _repeat(w: Writer, node: fx.Node, x: fx.Node, times: Sequence[Any]) -> str:
    missing = len(times) - len(shape_of(x))
    tensor = w.tensor(x)
    if missing:
        tensor = w.builder.op("Unsqueeze", [tensor, w.builder.ints(list(range(missing)))])
    parts = [w.env[s] if isinstance(s, fx.Node) else w.builder.ints([s]) for s in times]
    return w.builder.op("Tile", [tensor, w.builder.op("Concat", parts, axis=0)])


def _roll(w: Writer, node: fx.Node, x: fx.Node, shifts: Sequence[int], over: Sequence[int] = ()) -> str:
    if not over:
        raise UserError("a roll over the flattened tensor has no ONNX form here.")
    tensor, b = w.tensor(x), w.builder
    for shift, dim in zip(shifts, over):
        axis = axis_of(x, dim)
        cut = -shift % shape_of(x)[axis]
        if cut:
            head = b.op("Slice", [tensor, b.ints([0]), b.ints([cut]), b.ints([axis])])
            tail = b.op("Slice", [tensor, b.ints([cut]), b.ints([_END]), b.ints([axis])])
            tensor = b.op("Concat", [tail, head], axis=axis)
    return tensor


_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _pad(w: Writer, node: fx.Node, x: fx.Node, pads: Sequence[int], mode: str = "constant", value: Any = None) -> str:
    """torch lists pads from the last dimension on, begin and end together; ONNX all begins, then all ends."""
    if mode == "circular":
        w.builder.need(19)
    rank = len(shape_of(x))
    begins, ends = [0] * rank, [0] * rank
    for index in range(len(pads) // 2):
        begins[rank - 1 - index], ends[rank - 1 - index] = pads[2 * index], pads[2 * index + 1]
    inputs = [w.tensor(x), w.builder.ints(begins + ends)]
    if value:
        inputs.append(w.number(float(value)))
    return w.builder.op("Pad", inputs, mode=_MODES[mode])


def _constant_pad(w: Writer, node: fx.Node, x: fx.Node, pads: Sequence[int], value: float = 0.0) -> str:
    return _pad(w, node, x, pads, "constant", value)


def _pixel_shuffle(w: Writer, node: fx.Node, x: fx.Node, factor: int) -> str:
    return w.builder.op("DepthToSpace", [w.tensor(x)], blocksize=factor, mode="CRD")


def _channel_shuffle(w: Writer, node: fx.Node, x: fx.Node, groups: int) -> str:
    b, shape = w.builder, shape_of(x)
    split = b.op("Reshape", [w.tensor(x), b.ints([0, groups, shape[1] // groups, *shape[2:]])])
    turned = b.op("Transpose", [split], perm=[0, 2, 1, *range(3, len(shape) + 1)])
    return b.op("Reshape", [turned, b.ints([0, *shape[1:]])])


def _window(value: Any, rank: int) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * rank if len(values) == 1 else values


def _max_pool(
    w: Writer,
    node: fx.Node,
    x: fx.Node,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> str:
    rank = len(shape_of(x)) - 2
    written: dict[str, Any] = {"kernel_shape": _window(kernel, rank), "strides": _window(stride or kernel, rank)}
    if any(pads := _window(padding, rank) * 2):
        written["pads"] = pads
    if any(d != 1 for d in _window(dilation, rank)):
        written["dilations"] = _window(dilation, rank)
    if ceil_mode:
        written["ceil_mode"] = 1
    return w.builder.op("MaxPool", [w.tensor(x)], **written)


_TYPES = {torch.bool: TensorProto.BOOL, torch.int64: TensorProto.INT64, torch.int32: TensorProto.INT32}


def _cast(w: Writer, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> str:
    """Nothing for a value that has the type already; real values take the profile's."""
    before, after = x.meta["dtype"], node.meta["dtype"]
    if before == after or (before.is_floating_point and after.is_floating_point):
        return w.tensor(x)
    if after.is_floating_point:
        return w.builder.cast(w.tensor(x), helper.np_dtype_to_tensor_dtype(np.dtype(w.profile.floats)))
    if after not in _TYPES:
        raise UserError(f"the type {after} has no ONNX form here.")
    return w.builder.cast(w.tensor(x), _TYPES[after])


SHAPING: dict[Any, FunctionEmitter] = {
    aten.sym_size.int: _sym_size,
    operator.add: _sizes("Add"),
    operator.sub: _sizes("Sub"),
    operator.mul: _sizes("Mul"),
    operator.floordiv: _sizes("Div"),
    operator.getitem: _getitem,
    aten.reshape.default: _reshape,
    aten.view.default: _reshape,
    aten.flatten.using_ints: _flatten,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.unsqueeze.default: _unsqueeze,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.index_select.default: _index_select,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_sizes,
    aten.chunk.default: _chunk,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.expand.default: _expand,
    aten.repeat.default: _repeat,
    aten.roll.default: _roll,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _constant_pad,
    aten.pixel_shuffle.default: _pixel_shuffle,
    aten.channel_shuffle.default: _channel_shuffle,
    aten.max_pool2d.default: _max_pool,
    aten.max_pool1d.default: _max_pool,
    aten.to.dtype: _cast,
    aten._to_copy.default: _cast,
    aten.type_as.default: _cast,
}
