"""Elementwise operators, and which of a graph's values are functions of one other value alone.

``x * sigmoid(x)``, a Hardswish written by hand, ``relu6(x + 3) / 6``: whatever lies between a quantized tensor and the
next quantizer and is elementwise in that tensor is a map from its at most 256 codes to at most 256 codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from flatcompress.graph.rewrite import traced_shape

aten = torch.ops.aten
_BINARY = {
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor,
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.pow.Tensor_Scalar,
    aten.pow.Tensor_Tensor, aten.maximum.default, aten.minimum.default, aten.atan2.default,
}  # fmt: skip
_UNARY = {
    aten.abs.default, aten.neg.default, aten.exp.default, aten.expm1.default, aten.log.default, aten.log1p.default,
    aten.sqrt.default, aten.rsqrt.default, aten.square.default, aten.reciprocal.default, aten.sin.default,
    aten.cos.default, aten.erf.default, aten.tanh.default, aten.sigmoid.default, aten.hardsigmoid.default,
    aten.hardswish.default, aten.silu.default, aten.gelu.default, aten.elu.default, aten.selu.default,
    aten.celu.default, aten.leaky_relu.default, aten.mish.default, aten.softplus.default, aten.log_sigmoid.default,
    aten.softshrink.default, aten.hardshrink.default, aten.threshold.default,
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default,
    aten.clamp_max.default, aten.round.default, aten.floor.default, aten.ceil.default, aten.sign.default,
    aten.tan.default, aten.atan.default, aten.sinh.default, aten.cosh.default, aten.asinh.default,
}  # fmt: skip
POINTWISE: frozenset[Any] = frozenset(_BINARY | _UNARY)
CLAMPS: frozenset[Any] = frozenset({
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default,
})  # fmt: skip


def is_pointwise(node: fx.Node) -> bool:
    """Whether every element of ``node`` depends on the elements at its own place alone (broadcasting counts)."""
    return node.op == "call_function" and node.target in POINTWISE


def function_of_one(node: fx.Node, varies: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The one value that ``node`` is an elementwise function of, or None: same shape, constants of one element.

    ``varies``: whether a node depends on the network's input. The search goes back through pointwise operators and
    stops at whatever is none; a pointwise node whose parts come from two values is a function of neither. A constant
    with more than one element (PReLU's slopes, a LayerScale) makes the function differ by channel: None as well.

    >>> from flatcompress.graph.tracing import trace
    >>> gm = trace(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.SiLU(), torch.nn.Tanh()), torch.zeros(1, 2))
    >>> str(function_of_one(list(gm.graph.nodes)[-2], lambda n: True))
    '_0'
    """
    if not is_pointwise(node):
        return None
    roots = _roots(node, varies, {})
    if roots is None or len(roots) != 1:
        return None
    root = next(iter(roots))
    return root if _shape(root) == _shape(node) else None


def between(root: fx.Node, node: fx.Node) -> list[fx.Node]:
    """The nodes after ``root`` up to and with ``node``, of which ``node`` is a function, in execution order."""
    inside: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current is root or current in inside or current.op == "get_attr":
            continue
        inside.add(current)
        stack.extend(current.all_input_nodes)
    return [n for n in node.graph.nodes if n in inside]


def _roots(
    node: fx.Node, varies: Callable[[fx.Node], bool], memo: dict[fx.Node, set[fx.Node] | None]
) -> set[fx.Node] | None:
    """Where the values of pointwise ``node`` come from; None when a constant is more than a number."""
    if node in memo:
        return memo[node]
    found: set[fx.Node] | None = set()
    for part in node.all_input_nodes:
        if not varies(part):
            more: set[fx.Node] | None = set() if _elements(part) == 1 else None
        else:
            more = _roots(part, varies, memo) if is_pointwise(part) else {part}
        found = None if more is None or found is None else found | more
    memo[node] = found
    return found


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(str(s) for s in traced_shape(node))


def _elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 1
    return 1 if all(isinstance(s, int) and s == 1 for s in value.shape) else 2
