"""Emitters for reductions, sums along a dimension, and order: max, norms, variance, cumulative sums, top-k, sort."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from onnx import TensorProto
from torch import fx

from flatcompress.onnx_export.emit.values import as_type, axes_input, axes_of, axis_of, elements, fixed, type_of
from flatcompress.onnx_export.emit.writer import FunctionEmitter, Writer
from flatcompress.onnx_export.lower.lowering import function_path, is_global_pool_shape

aten = torch.ops.aten


def _reduce(kind: str) -> FunctionEmitter:
    """A reduction over ``dim``, over everything without one."""

    def emit(w: Writer, node: fx.Node, x: fx.Node, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> str:
        return axes_input(w, kind, as_type(w, x, type_of(node)), axes_of(x, dim), int(keepdim))

    return emit


def _reduce_all(kind: str) -> FunctionEmitter:
    """The form without a dimension, whose next argument is a type."""

    def emit(w: Writer, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> str:
        return axes_input(w, kind, as_type(w, x, type_of(node)), axes_of(x, None), 0)

    return emit


def _mean(w: Writer, node: fx.Node, x: fx.Node, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> str:
    """Over height and width this is GlobalAveragePool, which has an integer kernel."""
    if dim is None or not is_global_pool_shape(x, dim):
        return _reduce("ReduceMean")(w, node, x, dim, keepdim, dtype)
    pooled = w.builder.op("GlobalAveragePool", [w.tensor(x)], name=function_path(node))
    return pooled if keepdim else w.builder.op("Flatten", [pooled], axis=1)


def _truth(kind: str) -> FunctionEmitter:
    """any and all: the largest and the smallest of 0 and 1."""

    def emit(w: Writer, node: fx.Node, x: fx.Node, dim: Any = None, keepdim: bool = False) -> str:
        numbers = w.builder.cast(as_type(w, x, torch.bool), TensorProto.INT32)
        made = axes_input(w, kind, numbers, axes_of(x, dim), int(keepdim))
        return w.builder.cast(made, TensorProto.BOOL)

    return emit


def _extreme(reduce: str, argument: str) -> FunctionEmitter:
    """max and min over one dimension give (values, indices)."""

    def emit(w: Writer, node: fx.Node, x: fx.Node, dim: int, keepdim: bool = False) -> list[str]:
        axis, keep = axis_of(x, dim), int(keepdim)
        values = axes_input(w, reduce, w.tensor(x), [axis], keep)
        return [values, w.builder.op(argument, [w.tensor(x)], axis=axis, keepdims=keep)]

    return emit


def _argument(kind: str) -> FunctionEmitter:
    def emit(w: Writer, node: fx.Node, x: fx.Node, dim: int | None = None, keepdim: bool = False) -> str:
        source = w.tensor(x)
        if dim is None:
            flat = w.builder.op("Reshape", [source, w.builder.ints([-1])])
            return w.builder.op(kind, [flat], axis=0, keepdims=0)
        return w.builder.op(kind, [source], axis=axis_of(x, dim), keepdims=int(keepdim))

    return emit


def variance(w: Writer, x: str, axes: Sequence[int], keep: int, factor: float = 1.0) -> str:
    """The mean of squared distances from the mean, times ``factor`` (n / (n - correction))."""
    b = w.builder
    centred = b.op("Sub", [x, axes_input(w, "ReduceMean", x, axes, 1)])
    made = axes_input(w, "ReduceMean", b.op("Mul", [centred, centred]), axes, keep)
    return b.op("Mul", [made, w.number(factor)]) if factor != 1 else made


def _spread(root: bool, with_mean: bool = False) -> FunctionEmitter:
    """var and std, in the old form (unbiased) and the new one (correction); with the mean as well where asked."""

    def emit(w: Writer, node: fx.Node, x: fx.Node, *given: Any, **named: Any) -> Any:
        arguments = list(given)
        dim = named.get("dim")
        if arguments and not isinstance(arguments[0], bool):
            dim = arguments.pop(0)
        unbiased = arguments.pop(0) if arguments else named.get("unbiased", True)
        keep = int(arguments.pop(0) if arguments else named.get("keepdim", False))
        correction = named["correction"] if named.get("correction") is not None else int(unbiased)
        axes = axes_of(x, dim)
        for axis in axes:
            fixed(x, axis, "a variance")
        count = elements(x, axes)
        made = variance(w, w.tensor(x), axes, keep, count / max(0, count - correction) if count > correction else 0.0)
        made = w.builder.op("Sqrt", [made]) if root else made
        return [made, axes_input(w, "ReduceMean", w.tensor(x), axes, keep)] if with_mean else made

    return emit


def _norm(
    w: Writer, node: fx.Node, x: fx.Node, order: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> str:
    """(sum |x|^p)^(1/p); the largest or smallest |x| for an infinite p, the count of non-zeros for p = 0."""
    b, axes, keep = w.builder, axes_of(x, dim), int(keepdim)
    p, source = 2.0 if order is None else float(order), w.tensor(x)
    if p in (1.0, 2.0):
        return axes_input(w, f"ReduceL{int(p)}", source, axes, keep)
    size = b.op("Abs", [source])
    if abs(p) == float("inf"):
        return axes_input(w, "ReduceMax" if p > 0 else "ReduceMin", size, axes, keep)
    if p == 0:
        return axes_input(w, "ReduceSum", b.op("Sign", [size]), axes, keep)
    total = axes_input(w, "ReduceSum", b.op("Pow", [size, w.number(p)]), axes, keep)
    return b.op("Pow", [total, w.number(1 / p)])


def _cumsum(w: Writer, node: fx.Node, x: fx.Node, dim: int, *, dtype: Any = None) -> str:
    return w.builder.op("CumSum", [as_type(w, x, type_of(node)), w.builder.ints(axis_of(x, dim))])


def _top_k(
    w: Writer, node: fx.Node, x: fx.Node, k: int, dim: int = -1, largest: bool = True, in_order: bool = True
) -> list[str]:
    given: dict[str, Any] = {"axis": axis_of(x, dim), "largest": int(largest), "sorted": int(in_order)}
    count = w.env[k] if isinstance(k, fx.Node) else w.builder.ints([k])
    return w.builder.ops("TopK", [w.tensor(x), count], outputs=2, **given)


def _sort(w: Writer, node: fx.Node, x: fx.Node, dim: int = -1, descending: bool = False) -> list[str]:
    """A TopK of all; among equal values ONNX and a stable torch sort both take the lower index first."""
    axis = axis_of(x, dim)
    return _top_k(w, node, x, fixed(x, axis, "a sort"), axis, descending)


def _stable_sort(
    w: Writer, node: fx.Node, x: fx.Node, *, stable: Any = None, dim: int = -1, descending: bool = False
) -> list[str]:
    return _sort(w, node, x, dim, descending)


def _argsort(w: Writer, node: fx.Node, x: fx.Node, dim: int = -1, descending: bool = False) -> str:
    return _sort(w, node, x, dim, descending)[1]


REDUCTIONS: dict[Any, FunctionEmitter] = {
    aten.mean.default: _reduce_all("ReduceMean"),
    aten.mean.dim: _mean,
    aten.sum.default: _reduce_all("ReduceSum"),
    aten.sum.dim_IntList: _reduce("ReduceSum"),
    aten.prod.default: _reduce_all("ReduceProd"),
    aten.prod.dim_int: _reduce("ReduceProd"),
    aten.amax.default: _reduce("ReduceMax"),
    aten.amin.default: _reduce("ReduceMin"),
    aten.max.default: _reduce_all("ReduceMax"),
    aten.min.default: _reduce_all("ReduceMin"),
    aten.max.dim: _extreme("ReduceMax", "ArgMax"),
    aten.min.dim: _extreme("ReduceMin", "ArgMin"),
    aten.logsumexp.default: _reduce("ReduceLogSumExp"),
    **dict.fromkeys((aten.any.default, aten.any.dim, aten.any.dims), _truth("ReduceMax")),
    **dict.fromkeys((aten.all.default, aten.all.dim, aten.all.dims), _truth("ReduceMin")),
    **dict.fromkeys((aten.var.default, aten.var.dim, aten.var.correction), _spread(root=False)),
    **dict.fromkeys((aten.std.default, aten.std.dim, aten.std.correction), _spread(root=True)),
    **dict.fromkeys((aten.var_mean.default, aten.var_mean.dim, aten.var_mean.correction), _spread(False, True)),
    **dict.fromkeys((aten.std_mean.default, aten.std_mean.dim, aten.std_mean.correction), _spread(True, True)),
    aten.norm.Scalar: _norm,
    aten.norm.ScalarOpt_dim: _norm,
    aten.linalg_vector_norm.default: _norm,
    aten.argmax.default: _argument("ArgMax"),
    aten.argmin.default: _argument("ArgMin"),
    aten.cumsum.default: _cumsum,
    aten.topk.default: _top_k,
    aten.sort.default: _sort,
    aten.sort.stable: _stable_sort,
    aten.argsort.default: _argsort,
}
