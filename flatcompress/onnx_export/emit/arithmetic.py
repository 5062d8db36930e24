"""Emitters for arithmetic, comparisons and logic, value by value. Operands are cast as torch promotes them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from flatcompress.onnx_export.emit.values import as_type, common_type, type_of
from flatcompress.onnx_export.emit.writer import FunctionEmitter, Writer
from flatcompress.onnx_export.lower.lowering import function_path
from flatcompress.onnx_export.lower.prepare import clamp_bounds

aten = torch.ops.aten


def unary(kind: str, **attributes: Any) -> FunctionEmitter:
    """One operator of ONNX on one tensor; integers are cast where torch gives a real result."""

    def emit(w: Writer, node: fx.Node, x: fx.Node) -> str:
        return w.builder.op(kind, [as_type(w, x, type_of(node))], **attributes)

    return emit


def _binary(kind: str, swap: bool = False) -> FunctionEmitter:
    """Two operands, tensors or numbers; ``alpha`` scales the second, as torch's add and sub do."""

    def emit(w: Writer, node: fx.Node, a: Any, b: Any, alpha: float = 1) -> str:
        first, second = as_type(w, a, type_of(node)), as_type(w, b, type_of(node))
        if alpha != 1:
            scaled = first if swap else second
            scaled = w.builder.op("Mul", [scaled, as_type(w, alpha, type_of(node))])
            first, second = (scaled, second) if swap else (first, scaled)
        return w.builder.op(kind, [second, first] if swap else [first, second], name=function_path(node))

    return emit


def _compare(kind: str, negate: bool = False) -> FunctionEmitter:
    def emit(w: Writer, node: fx.Node, a: Any, b: Any) -> str:
        dtype = common_type(a, b)
        if dtype == torch.bool and kind != "Equal":
            dtype = torch.int32
        made = w.builder.op(kind, [as_type(w, a, dtype), as_type(w, b, dtype)])
        return w.builder.op("Not", [made]) if negate else made

    return emit


def _div(w: Writer, node: fx.Node, a: Any, b: Any, rounding_mode: str | None = None) -> str:
    """Truncation and floor of real quotients; whole numbers divide as they are."""
    dtype, build = type_of(node), w.builder
    first, second = as_type(w, a, dtype), as_type(w, b, dtype)
    if dtype.is_floating_point:
        quotient = build.op("Div", [first, second])
        if rounding_mode == "trunc":
            return truncated(w, quotient)
        return quotient if rounding_mode is None else build.op("Floor", [quotient])
    if rounding_mode == "floor":
        first = build.op("Sub", [first, build.op("Mod", [first, second])])
    return build.op("Div", [first, second])


def _floor_div(w: Writer, node: fx.Node, a: Any, b: Any) -> str:
    return _div(w, node, a, b, "floor")


def truncated(w: Writer, x: str) -> str:
    """Toward zero: the sign of x times the floor of |x|."""
    b = w.builder
    return b.op("Mul", [b.op("Sign", [x]), b.op("Floor", [b.op("Abs", [x])])])


def _trunc(w: Writer, node: fx.Node, x: fx.Node) -> str:
    return truncated(w, w.tensor(x)) if type_of(x).is_floating_point else w.tensor(x)


def _fmod(w: Writer, node: fx.Node, a: Any, b: Any) -> str:
    return w.builder.op("Mod", [as_type(w, a, type_of(node)), as_type(w, b, type_of(node))], fmod=1)


def _remainder(w: Writer, node: fx.Node, a: Any, b: Any) -> str:
    """torch's has the sign of the divisor: a - b floor(a / b)."""
    dtype, build = type_of(node), w.builder
    first, second = as_type(w, a, dtype), as_type(w, b, dtype)
    if not dtype.is_floating_point:
        return build.op("Mod", [first, second])
    whole = build.op("Floor", [build.op("Div", [first, second])])
    return build.op("Sub", [first, build.op("Mul", [second, whole])])


def _logical(kind: str) -> FunctionEmitter:
    def emit(w: Writer, node: fx.Node, *operands: Any) -> str:
        return w.builder.op(kind, [as_type(w, operand, torch.bool) for operand in operands])

    return emit


def _bitwise(logical: str, bitwise: str) -> FunctionEmitter:
    """Of truth values the logical operator; of integers, from opset 18 on, the bitwise one."""

    def emit(w: Writer, node: fx.Node, *operands: Any) -> str:
        dtype = type_of(node)
        if dtype != torch.bool:
            w.builder.need(18)
        names = [as_type(w, operand, dtype) for operand in operands]
        return w.builder.op(logical if dtype == torch.bool else bitwise, names)

    return emit


def _clamp(w: Writer, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> str:
    bounds = clamp_bounds(node)
    assert bounds is not None
    dtype = type_of(node)
    low, high = ("" if abs(v) == math.inf else as_type(w, v, dtype) for v in bounds)
    source = as_type(w, x, dtype)
    return w.builder.op("Clip", [source, low, high] if high else [source, low] if low else [source])


def _clamp_tensors(w: Writer, node: fx.Node, x: fx.Node, min: Any = None, max: Any = None) -> str:
    dtype = type_of(node)
    made = as_type(w, x, dtype)
    for kind, limit in (("Max", min), ("Min", max)):
        if limit is not None:
            made = w.builder.op(kind, [made, as_type(w, limit, dtype)])
    return made


def _clamp_max(w: Writer, node: fx.Node, x: fx.Node, limit: Any) -> str:
    return _clamp_tensors(w, node, x, None, limit)


def _rsqrt(w: Writer, node: fx.Node, x: fx.Node) -> str:
    return w.builder.op("Reciprocal", [w.builder.op("Sqrt", [as_type(w, x, type_of(node))])])


def _square(w: Writer, node: fx.Node, x: fx.Node) -> str:
    return w.builder.op("Mul", [w.tensor(x), w.tensor(x)])


def _expm1(w: Writer, node: fx.Node, x: fx.Node) -> str:
    return w.builder.op("Sub", [w.builder.op("Exp", [w.tensor(x)]), w.number(1.0)])


def _log1p(w: Writer, node: fx.Node, x: fx.Node) -> str:
    return w.builder.op("Log", [w.builder.op("Add", [w.tensor(x), w.number(1.0)])])


def _log_of_base(base: float) -> FunctionEmitter:
    def emit(w: Writer, node: fx.Node, x: fx.Node) -> str:
        logarithm = w.builder.op("Log", [as_type(w, x, type_of(node))])
        return w.builder.op("Mul", [logarithm, w.number(1 / math.log(base))])

    return emit


def _where(w: Writer, node: fx.Node, condition: fx.Node, a: Any, b: Any) -> str:
    branches = [as_type(w, value, type_of(node)) for value in (a, b)]
    return w.builder.op("Where", [as_type(w, condition, torch.bool), *branches])


def _masked_fill(w: Writer, node: fx.Node, x: fx.Node, mask: fx.Node, value: Any) -> str:
    return _where(w, node, mask, value, x)


def _isfinite(w: Writer, node: fx.Node, x: fx.Node) -> str:
    b = w.builder
    return b.op("Not", [b.op("Or", [b.op("IsNaN", [w.tensor(x)]), b.op("IsInf", [w.tensor(x)])])])


def _test(kind: str) -> FunctionEmitter:
    def emit(w: Writer, node: fx.Node, x: fx.Node) -> str:
        return w.builder.op(kind, [w.tensor(x)])

    return emit


def _addcmul(w: Writer, node: fx.Node, x: fx.Node, a: fx.Node, b: fx.Node, *, value: float = 1) -> str:
    return _plus(w, node, x, w.builder.op("Mul", [w.tensor(a), w.tensor(b)]), value)


def _addcdiv(w: Writer, node: fx.Node, x: fx.Node, a: fx.Node, b: fx.Node, *, value: float = 1) -> str:
    return _plus(w, node, x, w.builder.op("Div", [w.tensor(a), w.tensor(b)]), value)


def _plus(w: Writer, node: fx.Node, x: fx.Node, term: str, value: float) -> str:
    if value != 1:
        term = w.builder.op("Mul", [term, as_type(w, value, type_of(node))])
    return w.builder.op("Add", [w.tensor(x), term])


def _lerp(w: Writer, node: fx.Node, start: fx.Node, end: fx.Node, weight: Any) -> str:
    b = w.builder
    step = b.op("Sub", [w.tensor(end), w.tensor(start)])
    return b.op("Add", [w.tensor(start), b.op("Mul", [step, as_type(w, weight, type_of(node))])])


_SAME_NAME = (
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "erf", "exp", "floor", "log",
    "neg", "reciprocal", "round", "sign", "sin", "sinh", "sqrt", "tan",
)  # fmt: skip

ARITHMETIC: dict[Any, FunctionEmitter] = {
    **{getattr(aten, name).default: unary(name.capitalize()) for name in _SAME_NAME},
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _binary("Add")),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _binary("Sub")),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _binary("Mul")),
    **dict.fromkeys((aten.rsub.Scalar, aten.rsub.Tensor), _binary("Sub", swap=True)),
    **dict.fromkeys((aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar), _binary("Pow")),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode), _div),
    **dict.fromkeys((aten.floor_divide.default, aten.floor_divide.Scalar), _floor_div),
    **dict.fromkeys((aten.fmod.Tensor, aten.fmod.Scalar), _fmod),
    **dict.fromkeys((aten.remainder.Tensor, aten.remainder.Scalar), _remainder),
    **dict.fromkeys((aten.eq.Tensor, aten.eq.Scalar), _compare("Equal")),
    **dict.fromkeys((aten.ne.Tensor, aten.ne.Scalar), _compare("Equal", negate=True)),
    **dict.fromkeys((aten.lt.Tensor, aten.lt.Scalar), _compare("Less")),
    **dict.fromkeys((aten.gt.Tensor, aten.gt.Scalar), _compare("Greater")),
    **dict.fromkeys((aten.le.Tensor, aten.le.Scalar), _compare("LessOrEqual")),
    **dict.fromkeys((aten.ge.Tensor, aten.ge.Scalar), _compare("GreaterOrEqual")),
    **dict.fromkeys((aten.where.self, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf), _where),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
    **dict.fromkeys((aten.clamp.default, aten.clamp_min.default, aten.hardtanh.default, aten.relu6.default), _clamp),
    aten.clamp_max.default: _clamp_max,
    aten.clamp_max.Tensor: _clamp_max,
    aten.clamp_min.Tensor: _clamp_tensors,
    aten.clamp.Tensor: _clamp_tensors,
    aten.maximum.default: _binary("Max"),
    aten.minimum.default: _binary("Min"),
    aten.max.other: _binary("Max"),
    aten.min.other: _binary("Min"),
    **dict.fromkeys((aten.bitwise_and.Tensor, aten.__and__.Tensor), _bitwise("And", "BitwiseAnd")),
    **dict.fromkeys((aten.bitwise_or.Tensor, aten.__or__.Tensor), _bitwise("Or", "BitwiseOr")),
    **dict.fromkeys((aten.bitwise_xor.Tensor, aten.__xor__.Tensor), _bitwise("Xor", "BitwiseXor")),
    aten.bitwise_not.default: _bitwise("Not", "BitwiseNot"),
    aten.logical_and.default: _logical("And"),
    aten.logical_or.default: _logical("Or"),
    aten.logical_xor.default: _logical("Xor"),
    aten.logical_not.default: _logical("Not"),
    aten.isnan.default: _test("IsNaN"),
    aten.isinf.default: _test("IsInf"),
    aten.isfinite.default: _isfinite,
    aten.rsqrt.default: _rsqrt,
    aten.square.default: _square,
    aten.expm1.default: _expm1,
    aten.log1p.default: _log1p,
    aten.log2.default: _log_of_base(2),
    aten.log10.default: _log_of_base(10),
    aten.trunc.default: _trunc,
    aten.addcmul.default: _addcmul,
    aten.addcdiv.default: _addcdiv,
    aten.lerp.Scalar: _lerp,
    aten.lerp.Tensor: _lerp,
}
