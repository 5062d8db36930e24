"""Emitters for activation functions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from flatcompress.onnx_export.emit.arithmetic import unary
from flatcompress.onnx_export.emit.values import axis_of, rank_of, shape_of
from flatcompress.onnx_export.emit.writer import FunctionEmitter, Writer
from flatcompress.onnx_export.lower.lowering import function_path

aten = torch.ops.aten


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


def _scaled(w: Writer, x: str, factor: float) -> str:
    return x if factor == 1 else w.builder.op("Mul", [x, w.number(factor)])


def _elu(w: Writer, node: fx.Node, x: fx.Node, alpha: float = 1.0, scale: float = 1, input_scale: float = 1) -> str:
    """scale * (x for x > 0, alpha (exp(x input_scale) - 1) below)."""
    b, name = w.builder, w.tensor(x)
    if input_scale == 1:
        return _scaled(w, b.op("Elu", [name], alpha=float(alpha)), scale)
    below = b.op("Elu", [b.op("Mul", [name, w.number(input_scale)])], alpha=float(alpha))
    joined = b.op("Where", [b.op("Greater", [name, w.number(0.0)]), name, below])
    return _scaled(w, joined, scale)


def _celu(w: Writer, node: fx.Node, x: fx.Node, alpha: float = 1.0) -> str:
    return _elu(w, node, x, alpha, 1, 1 / alpha)


def _leaky_relu(w: Writer, node: fx.Node, x: fx.Node, slope: float = 0.01) -> str:
    return w.builder.op("LeakyRelu", [w.tensor(x)], alpha=float(slope))


def _rrelu(w: Writer, node: fx.Node, x: fx.Node, lower: float = 1 / 8, upper: float = 1 / 3, *_: Any) -> str:
    """In eval mode a LeakyReLU with the mean slope."""
    return _leaky_relu(w, node, x, (lower + upper) / 2)


def _prelu(w: Writer, node: fx.Node, x: fx.Node, weight: fx.Node) -> str:
    slopes = w.tensor(weight)
    if rank_of(weight) == 1 and rank_of(x) > 1:
        slopes = w.builder.op("Reshape", [slopes, w.builder.ints([-1] + [1] * (rank_of(x) - 2))])
    return w.builder.op("PRelu", [w.tensor(x), slopes])


def _softplus(w: Writer, node: fx.Node, x: fx.Node, beta: float = 1, threshold: float = 20) -> str:
    """log(1 + exp(beta x)) / beta; torch's threshold only keeps exp from overflowing."""
    return _scaled(w, w.builder.op("Softplus", [_scaled(w, w.tensor(x), beta)]), 1 / beta)


def _mish(w: Writer, node: fx.Node, x: fx.Node) -> str:
    return w.builder.op("Mul", [w.tensor(x), w.builder.op("Tanh", [w.builder.op("Softplus", [w.tensor(x)])])])


def _glu(w: Writer, node: fx.Node, x: fx.Node, dim: int = -1) -> str:
    """a sigmoid(b) of the two halves (arXiv 1612.08083, eq. 1)."""
    axis = axis_of(x, dim)
    half = shape_of(x)[axis] // 2
    first, gate = w.builder.ops("Split", [w.tensor(x), w.builder.ints([half, half])], outputs=2, axis=axis)
    return w.builder.op("Mul", [first, w.builder.op("Sigmoid", [gate])])


def _log_sigmoid(w: Writer, node: fx.Node, x: fx.Node) -> str:
    b = w.builder
    return b.op("Neg", [b.op("Softplus", [b.op("Neg", [w.tensor(x)])])])


def _shrink(bias: bool) -> FunctionEmitter:
    """Nothing within +-lambda; beyond it x, or x moved toward zero by lambda."""

    def emit(w: Writer, node: fx.Node, x: fx.Node, limit: float = 0.5) -> str:
        return w.builder.op("Shrink", [w.tensor(x)], lambd=float(limit), bias=float(limit) if bias else 0.0)

    return emit


def _threshold(w: Writer, node: fx.Node, x: fx.Node, threshold: float, value: float) -> str:
    above = w.builder.op("Greater", [w.tensor(x), w.number(threshold)])
    return w.builder.op("Where", [above, w.tensor(x), w.number(value)])


def _softmax(kind: str) -> FunctionEmitter:
    def emit(w: Writer, node: fx.Node, x: fx.Node, dim: int, dtype: Any = None) -> str:
        return w.builder.op(kind, [w.tensor(x)], axis=axis_of(x, dim), name=function_path(node))

    return emit


ACTIVATIONS: dict[Any, FunctionEmitter] = {
    aten.relu.default: _relu,
    aten.silu.default: _silu,
    aten.hardswish.default: _hardswish,
    aten.hardsigmoid.default: unary("HardSigmoid", alpha=1 / 6, beta=0.5),
    aten.sigmoid.default: unary("Sigmoid"),
    aten.tanh.default: unary("Tanh"),
    aten.gelu.default: _gelu,
    aten.elu.default: _elu,
    aten.selu.default: unary("Selu"),
    aten.celu.default: _celu,
    aten.leaky_relu.default: _leaky_relu,
    aten.rrelu.default: _rrelu,
    aten.prelu.default: _prelu,
    aten._prelu_kernel.default: _prelu,
    aten.softplus.default: _softplus,
    aten.mish.default: _mish,
    aten.glu.default: _glu,
    aten.log_sigmoid.default: _log_sigmoid,
    aten.hardshrink.default: _shrink(bias=False),
    aten.softshrink.default: _shrink(bias=True),
    aten.threshold.default: _threshold,
    aten.softmax.int: _softmax("Softmax"),
    aten.log_softmax.int: _softmax("LogSoftmax"),
    aten._softmax.default: _softmax("Softmax"),
    aten._log_softmax.default: _softmax("LogSoftmax"),
}
