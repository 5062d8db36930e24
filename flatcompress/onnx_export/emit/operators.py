"""Emitters for aten operators on real values: one small function each, one line in `FUNCTIONS`.

An emitter gets the writer, the node and the operator's own arguments, and returns the name of its result. To add an
operator, write one and list it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from flatcompress.errors import UserError
from flatcompress.onnx_export.emit.layers import conv as write_conv
from flatcompress.onnx_export.emit.shaping import SHAPING, axis_of, shape_of
from flatcompress.onnx_export.emit.writer import FunctionEmitter, Writer
from flatcompress.onnx_export.lower.lowering import function_path, is_global_pool
from flatcompress.onnx_export.lower.prepare import clamp_bounds

aten = torch.ops.aten


def _unary(kind: str, **attributes: Any) -> FunctionEmitter:
    def emit(w: Writer, node: fx.Node, x: fx.Node) -> str:
        return w.builder.op(kind, [w.tensor(x)], **attributes)

    return emit


def _binary(kind: str, swap: bool = False) -> FunctionEmitter:
    """Two operands, tensors or numbers; ``alpha`` scales the second, as torch's add and sub do."""

    def emit(w: Writer, node: fx.Node, a: Any, b: Any, alpha: float = 1) -> str:
        first, second = w.tensor(a), w.tensor(b)
        if alpha != 1:
            second = w.builder.op("Mul", [second, w.number(alpha)])
        return w.builder.op(kind, [second, first] if swap else [first, second], name=function_path(node))

    return emit


def _div(w: Writer, node: fx.Node, a: Any, b: Any, rounding_mode: str | None = None) -> str:
    quotient = w.builder.op("Div", [w.tensor(a), w.tensor(b)])
    if rounding_mode is None:
        return quotient
    if rounding_mode == "floor":
        return w.builder.op("Floor", [quotient])
    raise UserError(f"rounding_mode {rounding_mode!r} has no ONNX form here.")


def _logical(kind: str) -> FunctionEmitter:
    """~, & and | of truth values; on integers they mean something else."""

    def emit(w: Writer, node: fx.Node, *operands: fx.Node) -> str:
        if any(operand.meta["dtype"] != torch.bool for operand in operands):
            raise UserError("bitwise operators on integers have no ONNX form here.")
        return w.builder.op(kind, [w.tensor(operand) for operand in operands])

    return emit


def _not_equal(w: Writer, node: fx.Node, a: Any, b: Any) -> str:
    return w.builder.op("Not", [w.builder.op("Equal", [w.tensor(a), w.tensor(b)])])


def _clamp(w: Writer, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> str:
    bounds = clamp_bounds(node)
    if bounds is None:
        raise UserError("limits that are tensors have no ONNX form here.")
    low, high = ("" if abs(v) == math.inf else w.number(v) for v in bounds)
    return w.builder.op("Clip", [w.tensor(x), low, high] if high else [w.tensor(x), low])


def _relu(w: Writer, node: fx.Node, x: fx.Node) -> str:
    return w.builder.op("Relu", [w.tensor(x)], name=function_path(node))


def _silu(w: Writer, node: fx.Node, x: fx.Node) -> str:
    return w.builder.op("Mul", [w.tensor(x), w.builder.op("Sigmoid", [w.tensor(x)])])


def _hardswish(w: Writer, node: fx.Node, x: fx.Node) -> str:
    gate = w.builder.op("HardSigmoid", [w.tensor(x)], alpha=1 / 6, beta=0.5)
    return w.builder.op("Mul", [w.tensor(x), gate])


def _gelu(w: Writer, node: fx.Node, x: fx.Node, approximate: str = "none") -> str:
    """x/2 (1 + erf(x / sqrt 2)), or the tanh form (arXiv 1606.08415); written out below opset 20."""
    b, name = w.builder, w.tensor(x)
    if b.opset >= 20:
        return b.op("Gelu", [name], approximate=approximate)
    if approximate == "none":
        inner = b.op("Erf", [b.op("Div", [name, w.number(math.sqrt(2.0))])])
    else:
        cube = b.op("Mul", [b.op("Pow", [name, w.number(3.0)]), w.number(0.044715)])
        inner = b.op("Tanh", [b.op("Mul", [b.op("Add", [name, cube]), w.number(math.sqrt(2.0 / math.pi))])])
    return b.op("Mul", [b.op("Mul", [name, b.op("Add", [inner, w.number(1.0)])]), w.number(0.5)])


def _elu(w: Writer, node: fx.Node, x: fx.Node, alpha: float = 1.0, scale: float = 1, input_scale: float = 1) -> str:
    if scale != 1 or input_scale != 1:
        raise UserError("a scaled elu has no ONNX form here.")
    return w.builder.op("Elu", [w.tensor(x)], alpha=float(alpha))


def _leaky_relu(w: Writer, node: fx.Node, x: fx.Node, slope: float = 0.01) -> str:
    return w.builder.op("LeakyRelu", [w.tensor(x)], alpha=float(slope))


def _prelu(w: Writer, node: fx.Node, x: fx.Node, weight: fx.Node) -> str:
    slopes = w.builder.op("Reshape", [w.tensor(weight), w.builder.ints([-1] + [1] * (len(shape_of(x)) - 2))])
    return w.builder.op("PRelu", [w.tensor(x), slopes])


def _softplus(w: Writer, node: fx.Node, x: fx.Node, beta: float = 1, threshold: float = 20) -> str:
    if beta != 1:
        raise UserError("softplus with beta other than 1 has no ONNX form here.")
    return w.builder.op("Softplus", [w.tensor(x)])


def _mish(w: Writer, node: fx.Node, x: fx.Node) -> str:
    return w.builder.op("Mul", [w.tensor(x), w.builder.op("Tanh", [w.builder.op("Softplus", [w.tensor(x)])])])


def _softmax(kind: str) -> FunctionEmitter:
    def emit(w: Writer, node: fx.Node, x: fx.Node, dim: int, dtype: Any = None) -> str:
        return w.builder.op(kind, [w.tensor(x)], axis=axis_of(x, dim), name=function_path(node))

    return emit


def _rsqrt(w: Writer, node: fx.Node, x: fx.Node) -> str:
    return w.builder.op("Reciprocal", [w.builder.op("Sqrt", [w.tensor(x)])])


def _where(w: Writer, node: fx.Node, condition: fx.Node, a: Any, b: Any) -> str:
    return w.builder.op("Where", [w.tensor(condition), w.tensor(a), w.tensor(b)])


def _masked_fill(w: Writer, node: fx.Node, x: fx.Node, mask: fx.Node, value: Any) -> str:
    return w.builder.op("Where", [w.tensor(mask), w.tensor(value), w.tensor(x)])


def _matmul(w: Writer, node: fx.Node, a: fx.Node, b: fx.Node) -> str:
    return w.builder.op("MatMul", [w.tensor(a), w.tensor(b)], name=function_path(node))


def _addmm(w: Writer, node: fx.Node, bias: fx.Node, a: fx.Node, b: fx.Node) -> str:
    return w.builder.op("Gemm", [w.tensor(a), w.tensor(b), w.tensor(bias)], name=function_path(node))


def _linear(w: Writer, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> str:
    turned = w.builder.op("Transpose", [w.tensor(weight)], perm=[1, 0])
    product = w.builder.op("MatMul", [w.tensor(x), turned], name=function_path(node))
    return w.builder.op("Add", [product, w.tensor(bias)]) if bias is not None else product


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
    """A convolution whose weight is computed, so that it belongs to no layer."""
    inputs = [w.tensor(x), w.tensor(weight)] + ([w.tensor(bias)] if bias is not None else [])
    given = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return write_conv(w, inputs, given, shape_of(weight)[2:], function_path(node))


def _reduce(kind: str) -> FunctionEmitter:
    """A reduction over ``dim``; opset 18 made the axes of all but ReduceSum an input."""

    def emit(w: Writer, node: fx.Node, x: fx.Node, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> str:
        chosen = range(len(shape_of(x))) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
        axes, keep = sorted(axis_of(x, d) for d in chosen), int(keepdim)
        if w.builder.opset >= 18 or kind == "ReduceSum":
            return w.builder.op(kind, [w.tensor(x), w.builder.ints(axes)], keepdims=keep)
        return w.builder.op(kind, [w.tensor(x)], axes=axes, keepdims=keep)

    return emit


def _mean(w: Writer, node: fx.Node, x: fx.Node, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> str:
    """Over height and width this is GlobalAveragePool, which has an integer kernel."""
    if dim is None or not is_global_pool_shape(x, dim):
        return _reduce("ReduceMean")(w, node, x, dim, keepdim, dtype)
    pooled = w.builder.op("GlobalAveragePool", [w.tensor(x)], name=function_path(node))
    return pooled if keepdim else w.builder.op("Flatten", [pooled], axis=1)


def is_global_pool_shape(x: fx.Node, dim: Any) -> bool:
    """Whether ``dim`` are height and width of [B, C, H, W]."""
    return len(shape_of(x)) == 4 and isinstance(dim, list | tuple) and sorted(d % 4 for d in dim) == [2, 3]


def _argmax(w: Writer, node: fx.Node, x: fx.Node, dim: int, keepdim: bool = False) -> str:
    return w.builder.op("ArgMax", [w.tensor(x)], axis=axis_of(x, dim), keepdims=int(keepdim))


def _adaptive_pool(w: Writer, node: fx.Node, x: fx.Node, size: Any) -> str:
    if is_global_pool(node):
        return w.builder.op("GlobalAveragePool", [w.tensor(x)], name=function_path(node))
    spatial, wanted = shape_of(x)[2:], list(size) if isinstance(size, list | tuple) else [size]
    wanted = wanted * len(spatial) if len(wanted) == 1 else wanted
    if all(a == b for a, b in zip(spatial, wanted)):
        return w.tensor(x)
    if any(a % b for a, b in zip(spatial, wanted)):
        raise UserError(f"adaptive pooling of {spatial} to {wanted}: only even windows have an ONNX form.")
    window = [a // b for a, b in zip(spatial, wanted)]
    return w.builder.op("AveragePool", [w.tensor(x)], kernel_shape=window, strides=window)


def _adaptive_max(w: Writer, node: fx.Node, x: fx.Node, size: Any) -> list[str]:
    """torch returns (values, indices); only the values have a form here."""
    if any(s != 1 for s in (size if isinstance(size, list | tuple) else [size])):
        raise UserError("adaptive max pooling to more than one value has no ONNX form here.")
    return [w.builder.op("GlobalMaxPool", [w.tensor(x)])]


def _avg_pool(
    w: Writer,
    node: fx.Node,
    x: fx.Node,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> str:
    if divisor_override is not None or ceil_mode:
        raise UserError("average pooling with ceil_mode or its own divisor has no ONNX form here.")
    rank = len(shape_of(x)) - 2
    window, steps, pads = (_repeat(v, rank) for v in (kernel, stride or kernel, padding))
    written: dict[str, Any] = {"kernel_shape": window, "strides": steps}
    if any(pads):
        written |= {"pads": pads * 2, "count_include_pad": int(count_include_pad)}
    return w.builder.op("AveragePool", [w.tensor(x)], **written)


def _repeat(value: Any, rank: int) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * rank if len(values) == 1 else values


def _resize(mode: str, coordinates: str) -> FunctionEmitter:
    def emit(w: Writer, node: fx.Node, x: fx.Node, *arguments: Any, **_: Any) -> str:
        factors = [n / o for n, o in zip(shape_of(node)[2:], shape_of(x)[2:])]
        scales = w.builder.floats([1.0, 1.0, *factors])
        extra: dict[str, Any] = {"nearest_mode": "floor"} if mode == "nearest" else {}
        return w.builder.op(
            "Resize", [w.tensor(x), "", scales], mode=mode, coordinate_transformation_mode=coordinates, **extra
        )

    return emit


def _bilinear(w: Writer, node: fx.Node, x: fx.Node, size: Any, align_corners: bool, *_: Any, **__: Any) -> str:
    return _resize("linear", "align_corners" if align_corners else "half_pixel")(w, node, x)


def _embedding(w: Writer, node: fx.Node, weight: fx.Node, index: fx.Node, *_: Any) -> str:
    return w.builder.op("Gather", [w.tensor(weight), w.tensor(index)])


def _layer_norm(
    w: Writer,
    node: fx.Node,
    x: fx.Node,
    shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> str:
    scale = w.tensor(weight) if weight is not None else w.constant(torch.ones(list(shape)))
    inputs = [w.tensor(x), scale] + ([w.tensor(bias)] if bias is not None else [])
    return w.builder.op("LayerNormalization", inputs, axis=-len(shape), epsilon=float(eps))


FUNCTIONS: dict[Any, FunctionEmitter] = {
    **SHAPING,
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _binary("Add")),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _binary("Sub")),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _binary("Mul")),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode), _div),
    **dict.fromkeys((aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor), _binary("Pow")),
    **dict.fromkeys((aten.rsub.Scalar, aten.rsub.Tensor), _binary("Sub", swap=True)),
    **dict.fromkeys((aten.eq.Tensor, aten.eq.Scalar), _binary("Equal")),
    **dict.fromkeys((aten.lt.Tensor, aten.lt.Scalar), _binary("Less")),
    **dict.fromkeys((aten.gt.Tensor, aten.gt.Scalar), _binary("Greater")),
    **dict.fromkeys((aten.le.Tensor, aten.le.Scalar), _binary("LessOrEqual")),
    **dict.fromkeys((aten.ge.Tensor, aten.ge.Scalar), _binary("GreaterOrEqual")),
    **dict.fromkeys((aten.ne.Tensor, aten.ne.Scalar), _not_equal),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf), _where),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
    **dict.fromkeys((aten.matmul.default, aten.bmm.default, aten.mm.default), _matmul),
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv1d.padding, aten.conv2d.padding), _convolution),
    **dict.fromkeys((aten.clamp.default, aten.clamp_min.default, aten.hardtanh.default, aten.relu6.default), _clamp),
    **dict.fromkeys((aten.mean.default, aten.mean.dim), _mean),
    **dict.fromkeys((aten.sum.default, aten.sum.dim_IntList), _reduce("ReduceSum")),
    **dict.fromkeys((aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default), _adaptive_pool),
    **dict.fromkeys((aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default), _adaptive_max),
    **dict.fromkeys((aten.avg_pool1d.default, aten.avg_pool2d.default), _avg_pool),
    **dict.fromkeys((aten.upsample_nearest2d.default, aten.upsample_nearest2d.vec), _resize("nearest", "asymmetric")),
    **dict.fromkeys((aten.upsample_bilinear2d.default, aten.upsample_bilinear2d.vec), _bilinear),
    aten.amax.default: _reduce("ReduceMax"),
    aten.amin.default: _reduce("ReduceMin"),
    aten.maximum.default: _binary("Max"),
    aten.minimum.default: _binary("Min"),
    **dict.fromkeys((aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor), _logical("And")),
    **dict.fromkeys((aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor), _logical("Or")),
    **dict.fromkeys((aten.logical_not.default, aten.bitwise_not.default), _logical("Not")),
    aten.argmax.default: _argmax,
    aten.relu.default: _relu,
    aten.silu.default: _silu,
    aten.hardswish.default: _hardswish,
    aten.hardsigmoid.default: _unary("HardSigmoid", alpha=1 / 6, beta=0.5),
    aten.sigmoid.default: _unary("Sigmoid"),
    aten.tanh.default: _unary("Tanh"),
    aten.gelu.default: _gelu,
    aten.elu.default: _elu,
    aten.selu.default: _unary("Selu"),
    aten.leaky_relu.default: _leaky_relu,
    aten.prelu.default: _prelu,
    aten._prelu_kernel.default: _prelu,
    aten.softplus.default: _softplus,
    aten.mish.default: _mish,
    aten.softmax.int: _softmax("Softmax"),
    aten.log_softmax.int: _softmax("LogSoftmax"),
    aten.exp.default: _unary("Exp"),
    aten.log.default: _unary("Log"),
    aten.sqrt.default: _unary("Sqrt"),
    aten.rsqrt.default: _rsqrt,
    aten.neg.default: _unary("Neg"),
    aten.abs.default: _unary("Abs"),
    aten.erf.default: _unary("Erf"),
    aten.floor.default: _unary("Floor"),
    aten.ceil.default: _unary("Ceil"),
    aten.round.default: _unary("Round"),
    aten.sin.default: _unary("Sin"),
    aten.cos.default: _unary("Cos"),
    aten.sign.default: _unary("Sign"),
    aten.reciprocal.default: _unary("Reciprocal"),
    aten.addmm.default: _addmm,
    aten.linear.default: _linear,
    aten.embedding.default: _embedding,
    aten.layer_norm.default: _layer_norm,
}
