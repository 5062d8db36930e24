"""What every emitter asks about a value: its shape, its type, and the same value in another type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper
from torch import fx

from flatcompress.errors import UserError
from flatcompress.onnx_export.emit.writer import Writer

_TYPES = {
    torch.bool: (TensorProto.BOOL, np.bool_),
    torch.uint8: (TensorProto.UINT8, np.uint8),
    torch.int8: (TensorProto.INT8, np.int8),
    torch.int32: (TensorProto.INT32, np.int32),
    torch.int64: (TensorProto.INT64, np.int64),
}


def shape_of(node: Any) -> tuple[int, ...]:
    """A node's shape in the trace."""
    return tuple(node.meta["shape"])


def rank_of(node: Any) -> int:
    """How many dimensions a node has."""
    return len(node.meta["shape"])


def axis_of(node: Any, dim: int) -> int:
    """A dimension counted from the front."""
    return dim % max(1, rank_of(node))


def axes_of(node: Any, dim: Any) -> list[int]:
    """Dimensions counted from the front, in order; all of them for None and []."""
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return list(range(rank_of(node)))
    return sorted(axis_of(node, d) for d in ([dim] if isinstance(dim, int) else dim))


def is_dynamic(node: Any, axis: int) -> bool:
    """Whether a dimension differs from call to call; without a record of it, the first does."""
    return axis in node.meta.get("dynamic", (0,))


def fixed(node: Any, axis: int, what: str) -> int:
    """The size of a dimension that must be the same at every call, or a UserError that says ``what`` needs it."""
    if axis and is_dynamic(node, axis):
        raise UserError(f"{what} over a dimension whose size is left open has no ONNX form here.")
    return shape_of(node)[axis]


def several(value: Any, rank: int) -> list[Any]:
    """One setting per dimension from one, or from as many."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * rank if len(values) == 1 else values


def type_of(value: Any) -> torch.dtype:
    """The torch type of a node or a Python number; sizes are int64."""
    if isinstance(value, fx.Node):
        return value.meta.get("dtype", torch.int64)
    return {bool: torch.bool, int: torch.int64}.get(type(value), torch.float32)


def onnx_type(w: Writer, dtype: torch.dtype) -> int:
    """The ONNX type of a torch type; real ones take the profile's."""
    if dtype.is_floating_point:
        return helper.np_dtype_to_tensor_dtype(np.dtype(w.profile.floats))
    if dtype not in _TYPES:
        raise UserError(f"the type {dtype} has no ONNX form here.")
    return _TYPES[dtype][0]


def numpy_type(w: Writer, dtype: torch.dtype) -> Any:
    """The numpy type of a torch type; real ones take the profile's."""
    if dtype.is_floating_point:
        return w.profile.floats
    if dtype not in _TYPES:
        raise UserError(f"the type {dtype} has no ONNX form here.")
    return _TYPES[dtype][1]


def same_kind(first: torch.dtype, second: torch.dtype) -> bool:
    """Whether two torch types are one in the file."""
    return first == second or (first.is_floating_point and second.is_floating_point)


def as_type(w: Writer, value: Any, dtype: torch.dtype) -> str:
    """The tensor name of a node or a number, cast to ``dtype`` where it is something else."""
    if not isinstance(value, fx.Node):
        return w.builder.constant(np.asarray(value, numpy_type(w, dtype)))
    if same_kind(type_of(value), dtype):
        return w.env[value]
    return w.builder.cast(w.env[value], onnx_type(w, dtype))


def common_type(*values: Any) -> torch.dtype:
    """What torch promotes the operands of a comparison to, as far as a file tells types apart."""
    kinds = [type_of(value) for value in values]
    real = [kind for kind in kinds if kind.is_floating_point]
    if real:
        return real[0]
    tensors = [type_of(value) for value in values if isinstance(value, fx.Node) and type_of(value) != torch.bool]
    whole = [kind for kind in kinds if kind != torch.bool]
    return (tensors or whole or [torch.bool])[0]


def sizes(w: Writer, values: Sequence[Any]) -> str:
    """An int64 vector of sizes, some of which may be symbolic (one-element tensors)."""
    if not any(isinstance(size, fx.Node) for size in values):
        return w.builder.ints(list(values))
    parts = [w.env[s] if isinstance(s, fx.Node) else w.builder.ints([s]) for s in values]
    return w.builder.op("Concat", parts, axis=0)


def as_shape_of(w: Writer, node: Any) -> str:
    """The sizes of ``node`` as a vector for Reshape: 0 keeps the first, at most one other may be open."""
    shape = shape_of(node)
    open_ = [axis for axis in range(1, len(shape)) if is_dynamic(node, axis)]
    if len(open_) <= 1:
        return w.builder.ints([0 if not a else -1 if a in open_ else s for a, s in enumerate(shape)])
    return w.builder.op("Shape", [w.env[node]])


def per_channel(w: Writer, vector: Any, rank: int) -> str:
    """A vector [C] (a node or a tensor) as [C, 1, ...], to broadcast over [B, C, ...] of ``rank`` dimensions."""
    shape = [-1] + [1] * (rank - 2)
    if isinstance(vector, torch.Tensor):
        return w.constant(vector.reshape(shape))
    return w.env[vector] if rank == 2 else w.builder.op("Reshape", [w.env[vector], w.builder.ints(shape)])


def axes_input(w: Writer, kind: str, x: str, axes: Sequence[int], keep: int) -> str:
    """A reduction; opset 18 made the axes of all but ReduceSum an input."""
    if w.builder.opset >= 18 or kind == "ReduceSum":
        return w.builder.op(kind, [x, w.builder.ints(list(axes))], keepdims=keep)
    return w.builder.op(kind, [x], axes=list(axes), keepdims=keep)


def elements(node: Any, axes: Sequence[int]) -> int:
    """How many values a reduction over ``axes`` joins."""
    return math.prod(shape_of(node)[axis] for axis in axes)
