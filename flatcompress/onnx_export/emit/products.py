"""Emitters for products: matrices, einsum, linear layers and convolutions whose weight belongs to no layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from flatcompress.onnx_export.emit.layers import conv, conv_transpose
from flatcompress.onnx_export.emit.values import rank_of, shape_of
from flatcompress.onnx_export.emit.writer import FunctionEmitter, Writer
from flatcompress.onnx_export.lower.lowering import function_path

aten = torch.ops.aten


def _matmul(w: Writer, node: fx.Node, a: fx.Node, b: fx.Node) -> str:
    return w.builder.op("MatMul", [w.tensor(a), w.tensor(b)], name=function_path(node))


def _added_product(
    w: Writer, node: fx.Node, x: fx.Node, a: fx.Node, b: fx.Node, *, beta: Any = 1, alpha: Any = 1
) -> str:
    """beta x + alpha a b; a Gemm for plain matrices."""
    build = w.builder
    if rank_of(a) == 2 and rank_of(b) == 2 and rank_of(x) <= 2:
        given: dict[str, Any] = {key: float(value) for key, value in (("alpha", alpha), ("beta", beta)) if value != 1}
        return build.op("Gemm", [w.tensor(a), w.tensor(b), w.tensor(x)], name=function_path(node), **given)
    product, first = build.op("MatMul", [w.tensor(a), w.tensor(b)], name=function_path(node)), w.tensor(x)
    product = product if alpha == 1 else build.op("Mul", [product, w.number(alpha)])
    first = first if beta == 1 else build.op("Mul", [first, w.number(beta)])
    return build.op("Add", [first, product])


def _outer(w: Writer, node: fx.Node, a: fx.Node, b: fx.Node) -> str:
    column = w.builder.op("Unsqueeze", [w.tensor(a), w.builder.ints([1])])
    return w.builder.op("Mul", [column, w.tensor(b)])


def _einsum(w: Writer, node: fx.Node, equation: str, tensors: Sequence[fx.Node], path: Any = None) -> str:
    written = equation.replace(" ", "")
    return w.builder.op("Einsum", [w.tensor(t) for t in tensors], equation=written, name=function_path(node))


def _linear(w: Writer, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> str:
    turned = w.builder.op("Transpose", [w.tensor(weight)], perm=[1, 0]) if rank_of(weight) == 2 else w.tensor(weight)
    product = w.builder.op("MatMul", [w.tensor(x), turned], name=function_path(node))
    return w.builder.op("Add", [product, w.tensor(bias)]) if bias is not None else product


def _bilinear(w: Writer, node: fx.Node, a: fx.Node, b: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> str:
    made = w.builder.op("Einsum", [w.tensor(a), w.tensor(weight), w.tensor(b)], equation="...i,oij,...j->...o")
    return w.builder.op("Add", [made, w.tensor(bias)]) if bias is not None else made


def _convolution(
    w: Writer,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> str:
    inputs = [w.tensor(x), w.tensor(weight)] + ([w.tensor(bias)] if bias is not None else [])
    given = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return _with_batch(
        w, x, weight, inputs, lambda ready: conv(w, ready, given, shape_of(weight)[2:], function_path(node))
    )


def _transposed(
    w: Writer,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> str:
    inputs = [w.tensor(x), w.tensor(weight)] + ([w.tensor(bias)] if bias is not None else [])
    given = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    given["output_padding"] = output_padding
    kernel = shape_of(weight)[2:]
    return _with_batch(w, x, weight, inputs, lambda ready: conv_transpose(w, ready, given, kernel, function_path(node)))


def _with_batch(w: Writer, x: fx.Node, weight: fx.Node, inputs: list[str], emit: Any) -> str:
    """torch also convolves [C, ...] without a batch; ONNX wants one."""
    if rank_of(x) == rank_of(weight):
        return emit(inputs)
    axis = w.builder.ints([0])
    made = emit([w.builder.op("Unsqueeze", [inputs[0], axis]), *inputs[1:]])
    return w.builder.op("Squeeze", [made, axis])


def _core_convolution(
    w: Writer,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> str:
    if transposed:
        return _transposed(w, node, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _convolution(w, node, x, weight, bias, stride, padding, dilation, groups)


PRODUCTS: dict[Any, FunctionEmitter] = {
    **dict.fromkeys(
        (aten.matmul.default, aten.bmm.default, aten.mm.default, aten.mv.default, aten.dot.default), _matmul
    ),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default, aten.addmv.default), _added_product),
    aten.outer.default: _outer,
    aten.einsum.default: _einsum,
    aten.linear.default: _linear,
    aten.bilinear.default: _bilinear,
    **{getattr(getattr(aten, f"conv{n}d"), form): _convolution for n in (1, 2, 3) for form in ("default", "padding")},
    aten.conv_transpose1d.default: _transposed,
    aten.conv_transpose2d.input: _transposed,
    aten.conv_transpose3d.input: _transposed,
    aten.convolution.default: _core_convolution,
}
