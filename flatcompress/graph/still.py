"""Forwards that read no size: traced with the sizes of the example, which takes a third to a half of the time.

torch.export with a dynamic batch computes every shape with symbols. Where no operator's arguments come from a size, the
graph is the same without. Which operators a forward calls is noted while it runs; only those of a plain convolutional
network are let through, and the exported graph is then checked node by node: whatever it has beside them, and any of
them that could do something to the batch, has the forward traced with symbols after all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
_CALLS: frozenset[Any] = frozenset(
    {
        *(torch.conv1d, torch.conv2d, F.linear, F.batch_norm, F.pad, F.dropout, torch.flatten, torch.Tensor.flatten),
        *(F.relu, torch.relu, torch.relu_, F.hardtanh, F.relu6, F.silu, F.gelu, F.hardswish, torch.sigmoid),
        *(F.adaptive_avg_pool2d, F.avg_pool2d, torch.max_pool2d, F.max_pool2d, torch.Tensor.dim),
        *(F.hardsigmoid, F.leaky_relu, F.elu, torch.tanh, torch.Tensor.tanh, torch.Tensor.sigmoid),
        *(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.add_, torch.Tensor.__iadd__),
        *(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.mean, torch.Tensor.mean, torch.cat),
    }
)
_ELEMENTWISE = frozenset(
    {
        *(aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default, aten.relu6.default),
        *(aten.relu6_.default, aten.silu.default, aten.silu_.default, aten.gelu.default, aten.hardswish.default),
        *(aten.hardswish_.default, aten.sigmoid.default, aten.dropout.default, aten.hardsigmoid.default),
        *(aten.leaky_relu.default, aten.leaky_relu_.default, aten.elu.default, aten.tanh.default),
    }
)
_POOLS = frozenset({aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.max_pool2d.default})
_LAYERS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.linear.default, aten.batch_norm.default})
_SUMS = frozenset({aten.add.Tensor, aten.add_.Tensor})
_OF_TWO = _SUMS | {aten.mul.Tensor}


class Watch(TorchFunctionMode):
    """Notes, while a forward runs inside, whether it calls anything that may read a size (``still``: it does not)."""

    def __init__(self) -> None:
        super().__init__()
        self.still = True

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.still = self.still and func in _CALLS
        return func(*args, **(kwargs or {}))


def holds(program: torch.export.ExportedProgram) -> bool:
    """Whether the graph of ``program``, traced with an example's sizes, is right for every batch."""
    inputs = {s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"}
    samples: set[fx.Node] = set()  # what begins with the batch
    batch = None
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in inputs:
                batch = node.meta["val"].shape[0] if batch is None and _rank(node) > 1 else -1
                samples.add(node)
        elif node.op == "call_function":
            if _counts(node, samples):
                continue
            if not _keeps(node, samples) or node.meta["val"].shape[0] != batch:
                return False
            samples.add(node)
        elif node.op != "output":
            return False
    return batch is not None


def _counts(node: fx.Node, samples: set[fx.Node]) -> bool:
    """Whether it is a BatchNorm's count of its batches, which grows by one."""
    source = node.args[0] if node.args else None
    counted = isinstance(source, fx.Node) and source.op == "placeholder" and source not in samples
    return counted and node.target in _SUMS and node.args[1:] == (1,) and _rank(source) == 0


def _keeps(node: fx.Node, samples: set[fx.Node]) -> bool:
    """Whether an operator on ``samples`` gives a result for each sample, by itself, whatever their number."""
    nodes, first = node.all_input_nodes, node.args[0] if node.args else None
    if node.target is aten.cat.default:
        return all(n in samples for n in nodes) and len(node.args) > 1 and _behind(node.args[1], _rank(node))
    if first not in samples or not isinstance(first, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    if node.target in _LAYERS:
        weight = node.args[1]
        fits = node.target in (aten.linear.default, aten.batch_norm.default) or _rank(first) == _rank(weight)
        return fits and not any(other in samples for other in nodes if other is not first)
    if node.target in _OF_TWO:
        both = len(node.args) == 2 and node.args[1] in samples and not node.kwargs
        return both and _rank(first) == _rank(node.args[1])
    if nodes != [first]:
        return False
    if node.target is aten.flatten.using_ints:
        return len(node.args) > 1 and int(node.args[1]) >= 1  # type: ignore[arg-type]
    if node.target is aten.pad.default:
        return len(node.args[1]) < 2 * _rank(first)  # type: ignore[arg-type]
    if node.target is aten.mean.dim:
        dims = node.args[1]
        return isinstance(dims, list | tuple) and bool(dims) and all(_behind(dim, _rank(first)) for dim in dims)
    return node.target in _ELEMENTWISE or (node.target in _POOLS and _rank(first) == 4)


def _behind(dim: Any, rank: int) -> bool:
    """Whether a dimension of a result of ``rank`` is not that of the batch."""
    return isinstance(dim, int) and (dim if dim >= 0 else dim + rank) >= 1


def _rank(node: Any) -> int:
    return node.meta["val"].dim() if isinstance(node, fx.Node) else 0
