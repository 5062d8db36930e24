"""ONNX operators as torch: one function each, listed in `OPERATORS`.

A function gets the node's attributes and its inputs: tensors, None for one left out, numpy arrays for constants of
whole numbers (axes, sizes, indices) and lists for sizes that the network reads off its own tensors, which stay lists of
numbers so that torch.export follows them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flatcompress.errors import UserError

Operator = Callable[..., Any]
_FLOATS = {1: torch.float32, 10: torch.float32, 11: torch.float32, 16: torch.float32}  # computed in one real type
_TYPES = {
    **_FLOATS, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    4: torch.int32, 12: torch.int64, 13: torch.int64,
}  # fmt: skip


def ints(value: Any) -> list[Any]:
    """Whole numbers from a constant, a list of sizes or a number."""
    if isinstance(value, np.ndarray):
        return [int(v) for v in value.reshape(-1)]
    if isinstance(value, Tensor):
        raise UserError("takes its sizes or axes from values that the network computes.")
    return list(value) if isinstance(value, list | tuple) else [value]


def tensor(value: Any, like: Any = None) -> Any:
    """A tensor from whatever an input is."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    elif isinstance(value, list):
        value = torch.stack([torch.as_tensor(v) for v in value]) if value else torch.zeros(0, dtype=torch.int64)
    return value.to(like.device) if isinstance(like, Tensor) and isinstance(value, Tensor) else value


def type_of(code: int) -> torch.dtype:
    """The torch type of an ONNX type; every real type is float32."""
    if code not in _TYPES:
        raise UserError(f"holds values of ONNX type {code}, which torch has no use for.")
    return _TYPES[code]


def _map(function: Callable[..., Tensor]) -> Operator:
    def run(a: dict[str, Any], *inputs: Any) -> Any:
        return function(*(tensor(v, inputs[0]) for v in inputs))

    return run


def _arithmetic(function: Callable[[Any, Any], Any]) -> Operator:
    """On tensors, or on sizes number by number."""

    def run(a: dict[str, Any], x: Any, y: Any) -> Any:
        if isinstance(x, Tensor) or isinstance(y, Tensor):
            return function(tensor(x, y), tensor(y, x))
        if isinstance(x, list) or isinstance(y, list):
            first, second = ints(x), ints(y)
            count = max(len(first), len(second))
            first, second = (v * count if len(v) == 1 else v for v in (first, second))
            return [function(p, q) for p, q in zip(first, second)]
        return function(tensor(x), tensor(y))

    return run


def _divide(x: Any, y: Any) -> Any:
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        real = torch.result_type(x, y).is_floating_point
        return x / y if real else torch.div(x, y, rounding_mode="trunc")
    return x // y


def _several(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def run(a: dict[str, Any], first: Any, *rest: Any) -> Any:
        made = tensor(first)
        for other in rest:
            made = function(made, tensor(other, made))
        return made

    return run


def _mean(a: dict[str, Any], *inputs: Any) -> Any:
    return sum(tensor(v) for v in inputs) / len(inputs)


def _power(x: Any, y: Any) -> Any:
    return torch.pow(x, y).to(x.dtype) if isinstance(x, Tensor) else x**y


def _mod(a: dict[str, Any], x: Any, y: Any) -> Any:
    return torch.fmod(x, tensor(y, x)) if a.get("fmod") else _arithmetic(lambda p, q: p % q)(a, x, y)


def _clip(a: dict[str, Any], x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    low, high = a.get("min", low), a.get("max", high)
    if low is None and high is None:
        return x
    bounds = [None if v is None else float(v) if not isinstance(v, Tensor) else v for v in (low, high)]
    bounds = [v.item() if isinstance(v, np.ndarray) else v for v in bounds]
    if any(isinstance(v, Tensor) for v in bounds):
        return torch.clamp(x, *(None if v is None else torch.as_tensor(v) for v in bounds))
    if bounds[0] == 0 and bounds[1] is None:
        return F.relu(x)
    return F.relu6(x) if bounds == [0.0, 6.0] else torch.clamp(x, bounds[0], bounds[1])  # type: ignore[arg-type]


def _hard_sigmoid(a: dict[str, Any], x: Tensor) -> Tensor:
    alpha, beta = a.get("alpha", 0.2), a.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(alpha * x + beta, 0, 1)


def _gelu(a: dict[str, Any], x: Tensor) -> Tensor:
    return F.gelu(x, approximate=a.get("approximate", "none"))


def _elu(a: dict[str, Any], x: Tensor) -> Tensor:
    return F.elu(x, a.get("alpha", 1.0))


def _selu(a: dict[str, Any], x: Tensor) -> Tensor:
    alpha, gamma = a.get("alpha", 1.6732632), a.get("gamma", 1.0507010)
    return gamma * F.elu(x, alpha)


def _celu(a: dict[str, Any], x: Tensor) -> Tensor:
    return F.celu(x, a.get("alpha", 1.0))


def _leaky(a: dict[str, Any], x: Tensor) -> Tensor:
    return F.leaky_relu(x, a.get("alpha", 0.01))


def _thresholded(a: dict[str, Any], x: Tensor) -> Tensor:
    return F.threshold(x, a.get("alpha", 1.0), 0.0)


def _prelu(a: dict[str, Any], x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x >= 0, x, x * slope)


def _shrink(a: dict[str, Any], x: Tensor) -> Tensor:
    bias, limit = a.get("bias", 0.0), a.get("lambd", 0.5)
    return torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, torch.zeros_like(x)))


def _softmax(function: Callable[..., Tensor]) -> Operator:
    def run(a: dict[str, Any], x: Tensor) -> Tensor:
        if a["opset"] >= 13:
            return function(x, dim=a.get("axis", -1))
        axis = a.get("axis", 1) % x.dim()  # before opset 13 over all dimensions from the axis on
        return function(x.flatten(axis), dim=-1).reshape(x.shape) if axis < x.dim() - 1 else function(x, dim=-1)

    return run


def _cast(a: dict[str, Any], x: Any, *_: Any) -> Any:
    if isinstance(x, list):
        return x if not type_of(a["to"]).is_floating_point else tensor(x).to(type_of(a["to"]))
    return tensor(x).to(type_of(a["to"]))


def _where(a: dict[str, Any], condition: Any, x: Any, y: Any) -> Any:
    if isinstance(condition, list) and not any(isinstance(v, Tensor) for v in (x, y)):  # of sizes, number by number
        first, second = ints(x), ints(y)
        return [first[i % len(first)] if c else second[i % len(second)] for i, c in enumerate(condition)]
    return torch.where(tensor(condition), tensor(x), tensor(y))


def axes_of(a: dict[str, Any], given: Any) -> list[int] | None:
    """Axes from the attribute of old opsets or the input of new ones."""
    if given is not None:
        return ints(given)
    found = a.get("axes")
    return None if found is None else list(found)


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def run(a: dict[str, Any], x: Tensor, axes: Any = None) -> Tensor:
        chosen = axes_of(a, axes)
        if not chosen:
            if a.get("noop_with_empty_axes"):
                return x
            chosen = list(range(x.dim()))
        return function(x, chosen, bool(a.get("keepdims", 1)))

    return run


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((d % x.dim() for d in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _argument(function: Callable[..., Tensor]) -> Operator:
    def run(a: dict[str, Any], x: Tensor) -> Tensor:
        return function(x, dim=a.get("axis", 0), keepdim=bool(a.get("keepdims", 1)))

    return run


def _top_k(a: dict[str, Any], x: Tensor, k: Any = None) -> tuple[Tensor, Tensor]:
    count = ints(k)[0] if k is not None else a["k"]
    return tuple(torch.topk(x, count, a.get("axis", -1), bool(a.get("largest", 1))))  # type: ignore[return-value]


def _cumsum(a: dict[str, Any], x: Tensor, axis: Any) -> Tensor:
    if a.get("exclusive") or a.get("reverse"):
        raise UserError("is a cumulative sum that runs backwards or leaves out its own value.")
    return torch.cumsum(x, ints(axis)[0])


def _matmul(a: dict[str, Any], x: Tensor, y: Tensor) -> Tensor:
    return torch.matmul(x, y)


def _gemm(a: dict[str, Any], x: Tensor, y: Tensor, c: Any = None) -> Tensor:
    first, second = (x.T if a.get("transA") else x), (y.T if a.get("transB") else y)
    product = a.get("alpha", 1.0) * (first @ second)
    return product if c is None else product + a.get("beta", 1.0) * tensor(c, x)


def _einsum(a: dict[str, Any], *inputs: Tensor) -> Tensor:
    return torch.einsum(a["equation"], *inputs)


def _depth_to_space(a: dict[str, Any], x: Tensor) -> Tensor:
    size = a["blocksize"]
    if a.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, size)
    split = x.unflatten(1, (size, size, -1)).permute(0, 3, 4, 1, 5, 2)
    return split.flatten(4, 5).flatten(2, 3)


def _space_to_depth(a: dict[str, Any], x: Tensor) -> Tensor:
    size = a["blocksize"]
    made = F.pixel_unshuffle(x, size).unflatten(1, (-1, size * size))
    return made.transpose(1, 2).flatten(1, 2)


def _grid_sample(a: dict[str, Any], x: Tensor, grid: Tensor) -> Tensor:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(a.get("mode", "bilinear"), a.get("mode", "bilinear"))
    return F.grid_sample(x, grid, mode, a.get("padding_mode", "zeros"), bool(a.get("align_corners", 0)))


def _lp_norm(a: dict[str, Any], x: Tensor) -> Tensor:
    return F.normalize(x, a.get("p", 2), a.get("axis", -1))


def _lrn(a: dict[str, Any], x: Tensor) -> Tensor:
    return F.local_response_norm(x, a["size"], a.get("alpha", 1e-4), a.get("beta", 0.75), a.get("bias", 1.0))


def _first(a: dict[str, Any], x: Any, *_: Any) -> Any:
    return x


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    **{name.capitalize(): getattr(torch, name) for name in (
        "abs", "neg", "exp", "log", "sqrt", "floor", "ceil", "round", "sin", "cos", "tan", "asin", "acos", "atan",
        "sinh", "cosh", "asinh", "acosh", "atanh", "erf", "sign", "reciprocal", "sigmoid", "tanh",
    )},
    "Relu": F.relu, "Softplus": F.softplus, "Softsign": F.softsign, "HardSwish": F.hardswish, "Mish": F.mish,
    "IsNaN": torch.isnan, "IsInf": torch.isinf, "Not": torch.logical_not, "Det": torch.det,
}  # fmt: skip
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda x, y: x + y, "Sub": lambda x, y: x - y, "Mul": lambda x, y: x * y, "Div": _divide, "Pow": _power,
    "Equal": lambda x, y: x == y, "Less": lambda x, y: x < y, "Greater": lambda x, y: x > y,
    "LessOrEqual": lambda x, y: x <= y, "GreaterOrEqual": lambda x, y: x >= y,
}  # fmt: skip
_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceMean": lambda x, d, k: x.mean(d, keepdim=k),
    "ReduceSum": lambda x, d, k: x.sum(d, keepdim=k),
    "ReduceMax": lambda x, d, k: x.amax(d, keepdim=k),
    "ReduceMin": lambda x, d, k: x.amin(d, keepdim=k),
    "ReduceProd": _product,
    "ReduceL1": lambda x, d, k: x.abs().sum(d, keepdim=k),
    "ReduceL2": lambda x, d, k: x.square().sum(d, keepdim=k).sqrt(),
    "ReduceSumSquare": lambda x, d, k: x.square().sum(d, keepdim=k),
    "ReduceLogSum": lambda x, d, k: x.sum(d, keepdim=k).log(),
    "ReduceLogSumExp": lambda x, d, k: torch.logsumexp(x, d, keepdim=k),
}
OPERATORS: dict[str, Operator] = {
    **{name: _map(function) for name, function in _UNARY.items()},
    **{name: _arithmetic(function) for name, function in _BINARY.items()},
    **{name: _reduce(function) for name, function in _REDUCTIONS.items()},
    "And": _map(torch.logical_and), "Or": _map(torch.logical_or), "Xor": _map(torch.logical_xor),
    "BitwiseAnd": _map(torch.bitwise_and), "BitwiseOr": _map(torch.bitwise_or), "BitwiseNot": _map(torch.bitwise_not),
    "Max": _several(torch.maximum), "Min": _several(torch.minimum), "Sum": _several(torch.add), "Mean": _mean,
    "Mod": _mod, "Clip": _clip, "HardSigmoid": _hard_sigmoid, "Gelu": _gelu, "Elu": _elu, "Selu": _selu, "Celu": _celu,
    "LeakyRelu": _leaky, "ThresholdedRelu": _thresholded, "PRelu": _prelu, "Shrink": _shrink,
    "Softmax": _softmax(F.softmax), "LogSoftmax": _softmax(F.log_softmax), "Cast": _cast, "CastLike": _first,
    "Where": _where, "ArgMax": _argument(torch.argmax), "ArgMin": _argument(torch.argmin), "TopK": _top_k,
    "CumSum": _cumsum,                 "MatMul": _matmul, "Gemm": _gemm,
    "Einsum": _einsum, "DepthToSpace": _depth_to_space, "SpaceToDepth": _space_to_depth, "GridSample": _grid_sample,
    "LpNormalization": _lp_norm, "LRN": _lrn, "Identity": _first, "Dropout": _first,
}  # fmt: skip
