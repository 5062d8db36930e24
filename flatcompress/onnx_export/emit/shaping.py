"""Emitters for operators that move, cut or repeat values. They take real tensors and uint8 codes alike."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from flatcompress.onnx_export.emit.values import (
    as_shape_of,
    as_type,
    axis_of,
    fixed,
    is_dynamic,
    rank_of,
    shape_of,
    sizes,
    type_of,
)
from flatcompress.onnx_export.emit.writer import FunctionEmitter, Writer

aten = torch.ops.aten
_END = (1 << 63) - 1


def dims(w: Writer, wanted: Sequence[Any]) -> str:
    """Sizes for a Reshape: one symbolic size alone is a -1."""
    symbolic = [s for s in wanted if isinstance(s, fx.Node)]
    if len(symbolic) == 1 and -1 not in wanted:
        return w.builder.ints([-1 if isinstance(s, fx.Node) else s for s in wanted])
    return sizes(w, wanted)


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
    if any(is_dynamic(x, axis) for axis in range(end + 1, len(shape))):
        return _flatten_by_shape(w, x, start, end)
    # 0 copies a dimension, so those before stay open
    return w.builder.op("Reshape", [w.tensor(x), w.builder.ints([*([0] * start), -1, *shape[end + 1 :]])])


def _flatten_by_shape(w: Writer, x: fx.Node, start: int, end: int) -> str:
    b = w.builder
    whole = b.op("Shape", [w.tensor(x)])
    ends = [b.op("Slice", [whole, b.ints([i]), b.ints([j])]) for i, j in ((0, start), (end + 1, _END))]
    return b.op("Reshape", [w.tensor(x), b.op("Concat", [ends[0], b.ints([-1]), ends[1]], axis=0)])


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


def _narrow(w: Writer, node: fx.Node, x: fx.Node, dim: int, start: Any, length: int) -> str:
    return _slice(w, node, x, dim, start, start + length)


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
    pieces = _pieces(w, x, [1] * fixed(x, axis, "unbind"), axis)
    return [w.builder.op("Squeeze", [piece, w.builder.ints([axis])]) for piece in pieces]


def _split(w: Writer, node: fx.Node, x: fx.Node, size: int, dim: int = 0) -> list[str]:
    axis = axis_of(x, dim)
    total = fixed(x, axis, "a split")
    return _pieces(w, x, [min(size, total - start) for start in range(0, total, size)], axis)


def _split_sizes(w: Writer, node: fx.Node, x: fx.Node, sizes: Sequence[int], dim: int = 0) -> list[str]:
    return _pieces(w, x, list(sizes), axis_of(x, dim))


def _chunk(w: Writer, node: fx.Node, x: fx.Node, chunks: int, dim: int = 0) -> list[str]:
    return _split(w, node, x, -(-shape_of(x)[axis_of(x, dim)] // chunks), dim)


def _getitem(w: Writer, node: fx.Node, x: fx.Node, index: int) -> Any:
    return w.env[x][index]


def _cat(w: Writer, node: fx.Node, tensors: Sequence[fx.Node], dim: int = 0) -> str:
    parts = [as_type(w, t, type_of(node)) for t in tensors if shape_of(t) != (0,)]
    return w.builder.op("Concat", parts, axis=axis_of(node, dim))


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
    tensor, b = w.tensor(x), w.builder
    if not over:
        flat = b.op("Reshape", [tensor, b.ints([-1])])
        length = b.op("Shape", [flat])
        at = b.op("Mod", [b.ints([-shifts[0]]), length])
        parts = [b.op("Slice", [flat, *ends]) for ends in ((at, length), (b.ints([0]), at))]
        return b.op("Reshape", [b.op("Concat", parts, axis=0), b.op("Shape", [tensor])])
    for shift, dim in zip(shifts, over):
        axis = axis_of(x, dim)
        cut = -shift % fixed(x, axis, "a roll")
        if cut:
            head = b.op("Slice", [tensor, b.ints([0]), b.ints([cut]), b.ints([axis])])
            tail = b.op("Slice", [tensor, b.ints([cut]), b.ints([_END]), b.ints([axis])])
            tensor = b.op("Concat", [tail, head], axis=axis)
    return tensor


_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _pad(w: Writer, node: fx.Node, x: fx.Node, pads: Sequence[int], mode: str = "constant", value: Any = None) -> str:
    """torch lists pads from the last dimension on, begin and end together; ONNX all begins, then all ends."""
    if mode == "circular" and w.builder.opset < 19:
        return _wrapped(w, x, pads)
    rank = rank_of(x)
    begins, ends = [0] * rank, [0] * rank
    for index in range(len(pads) // 2):
        begins[rank - 1 - index], ends[rank - 1 - index] = pads[2 * index], pads[2 * index + 1]
    amounts = begins + ends
    inputs = [w.tensor(x), sizes(w, amounts)]
    if value:
        inputs.append(as_type(w, value, type_of(x)))
    return w.builder.op("Pad", inputs, mode=_MODES[mode])


def _wrapped(w: Writer, x: fx.Node, pads: Sequence[int]) -> str:
    """Pad's mode for circular padding came with opset 19: the ends are cut off and joined on the other side."""
    b, made = w.builder, w.tensor(x)
    for index in range(len(pads) // 2):
        axis, (begin, end) = rank_of(x) - 1 - index, pads[2 * index : 2 * index + 2]
        parts = [made]
        if begin:
            parts.insert(0, b.op("Slice", [made, b.ints([-begin]), b.ints([_END]), b.ints([axis])]))
        if end:
            parts.append(b.op("Slice", [made, b.ints([0]), b.ints([end]), b.ints([axis])]))
        made = b.op("Concat", parts, axis=axis) if len(parts) > 1 else made
    return made


def _constant_pad(w: Writer, node: fx.Node, x: fx.Node, pads: Sequence[int], value: float = 0.0) -> str:
    return _pad(w, node, x, pads, "constant", value)


def _pad_mode(mode: str) -> FunctionEmitter:
    def emit(w: Writer, node: fx.Node, x: fx.Node, pads: Sequence[int]) -> str:
        return _pad(w, node, x, pads, mode)

    return emit


def _channel_shuffle(w: Writer, node: fx.Node, x: fx.Node, groups: int) -> str:
    b, shape = w.builder, shape_of(x)
    sizes_of = [w.builder.ints([s]) for s in (0, groups, shape[1] // groups)]
    spatial = b.op("Slice", [b.op("Shape", [w.tensor(x)]), b.ints([2]), b.ints([_END]), b.ints([0])])
    if not any(is_dynamic(x, axis) for axis in range(1, rank_of(x))):
        split = b.op("Reshape", [w.tensor(x), b.ints([0, groups, shape[1] // groups, *shape[2:]])])
    else:
        split = b.op("Reshape", [w.tensor(x), b.op("Concat", [*sizes_of, spatial], axis=0)])
    turned = b.op("Transpose", [split], perm=[0, 2, 1, *range(3, len(shape) + 1)])
    return b.op("Reshape", [turned, as_shape_of(w, x)])


def _cast(w: Writer, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> str:
    """Nothing for a value that has the type already; real values take the profile's."""
    return as_type(w, x, type_of(node))


def _same(w: Writer, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> str:
    return w.tensor(x)


def _move_dims(w: Writer, node: fx.Node, x: fx.Node, source: Any, target: Any) -> str:
    before = [axis_of(x, d) for d in ([source] if isinstance(source, int) else source)]
    after = [axis_of(x, d) for d in ([target] if isinstance(target, int) else target)]
    order = [axis for axis in range(rank_of(x)) if axis not in before]
    for place, axis in sorted(zip(after, before)):
        order.insert(place, axis)
    return w.builder.op("Transpose", [w.tensor(x)], perm=order)


def _reversed(last_two: bool) -> FunctionEmitter:
    def emit(w: Writer, node: fx.Node, x: fx.Node) -> str:
        order = list(range(rank_of(x)))
        order = [*order[:-2], order[-1], order[-2]] if last_two else order[::-1]
        return w.builder.op("Transpose", [w.tensor(x)], perm=order)

    return emit


def _unflatten(w: Writer, node: fx.Node, x: fx.Node, dim: int, wanted: Sequence[Any]) -> str:
    axis, shape = axis_of(x, dim), shape_of(x)
    kept = [a for a in range(1, len(shape)) if a != axis and is_dynamic(x, a)]
    if kept or (axis == 0 and -1 not in wanted and not any(isinstance(s, fx.Node) for s in wanted)):
        b = w.builder
        whole = b.op("Shape", [w.tensor(x)])
        ends = [b.op("Slice", [whole, b.ints([i]), b.ints([j])]) for i, j in ((0, axis), (axis + 1, _END))]
        return b.op("Reshape", [w.tensor(x), b.op("Concat", [ends[0], sizes(w, wanted), ends[1]], axis=0)])
    return w.builder.op("Reshape", [w.tensor(x), sizes(w, [*([0] * axis), *wanted, *shape[axis + 1 :]])])


def _as_other(kind: str) -> FunctionEmitter:
    """The shape of another tensor."""

    def emit(w: Writer, node: fx.Node, x: fx.Node, other: fx.Node) -> str:
        return w.builder.op(kind, [w.tensor(x), w.builder.op("Shape", [w.tensor(other)])])

    return emit


SHAPING: dict[Any, FunctionEmitter] = {
    aten.sym_size.int: _sym_size,
    operator.add: _sizes("Add"),
    operator.sub: _sizes("Sub"),
    operator.mul: _sizes("Mul"),
    operator.floordiv: _sizes("Div"),
    operator.mod: _sizes("Mod"),
    torch.sym_max: _sizes("Max"),
    torch.sym_min: _sizes("Min"),
    operator.getitem: _getitem,
    **dict.fromkeys((aten.reshape.default, aten.view.default, aten._unsafe_view.default), _reshape),
    aten.flatten.using_ints: _flatten,
    aten.unflatten.int: _unflatten,
    **dict.fromkeys((aten.permute.default,), _permute),
    **dict.fromkeys((aten.transpose.int, aten.t.default, aten.swapaxes.default, aten.swapdims.default), _transpose),
    **dict.fromkeys((aten.movedim.int, aten.movedim.intlist), _move_dims),
    aten.numpy_T.default: _reversed(last_two=False),
    aten.mT.default: _reversed(last_two=True),
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _squeeze),
    aten.unsqueeze.default: _unsqueeze,
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
    aten.select.int: _select,
    aten.index_select.default: _index_select,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _split,
    **dict.fromkeys((aten.split_with_sizes.default, aten.split.sizes), _split_sizes),
    aten.chunk.default: _chunk,
    **dict.fromkeys((aten.cat.default, aten.concat.default), _cat),
    aten.stack.default: _stack,
    aten.expand.default: _expand,
    aten.expand_as.default: _as_other("Expand"),
    **dict.fromkeys((aten.view_as.default, aten.reshape_as.default), _as_other("Reshape")),
    **dict.fromkeys((aten.repeat.default, aten.tile.default), _repeat),
    aten.roll.default: _roll,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _constant_pad,
    **{getattr(aten, f"reflection_pad{n}d").default: _pad_mode("reflect") for n in (1, 2, 3)},
    **{getattr(aten, f"replication_pad{n}d").default: _pad_mode("replicate") for n in (1, 2, 3)},
    aten.channel_shuffle.default: _channel_shuffle,
    **dict.fromkeys((aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.to.dtype_layout), _cast),
    **dict.fromkeys((aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default), _same),
    aten.lift_fresh_copy.default: _same,
}
