"""Multiply-accumulates per layer, read off the traced graph."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from flatcompress.graph.rewrite import first_input
from flatcompress.graph.tracing import trace

aten = torch.ops.aten
WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
MATMULS = (aten.matmul.default, aten.bmm.default, aten.mm.default)
_CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding, aten.conv1d.padding)


def weighted(gm: fx.GraphModule) -> list[fx.Node]:
    """The conv and linear ``call_module`` nodes of ``gm`` in execution order (a shared module appears at each call)."""
    return [n for n in gm.graph.nodes if n.op == "call_module" and isinstance(gm.get_submodule(n.target), WEIGHTED)]


def macs(model: nn.Module, example_input: torch.Tensor) -> dict[str, int]:
    """Multiply-accumulates per sample of every conv, linear layer and matrix product, by qualified name.

    A matrix product belongs to no module: its key is ``path:node``. Biases, normalisation and activations count
    nothing, as usual. A module called twice counts twice. ``example_input``: [B, ...], any B >= 1.

    >>> macs(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), torch.zeros(1, 3, 4, 4))
    {'0': 3456}
    """
    gm = trace(model, example_input)
    counts: dict[str, int] = {}
    for node in gm.graph.nodes:
        cost = _node_macs(gm, node)
        if cost:
            key, count = cost
            counts[key] = counts.get(key, 0) + count
    return counts


def total_macs(model: nn.Module, example_input: torch.Tensor) -> int:
    """The sum of `macs` over all layers."""
    return sum(macs(model, example_input).values())


def numel_per_sample(node: fx.Node) -> int:
    """Elements of a node's output for one sample; the traced batch may hide in a merged dimension (B*T)."""
    return round(_numel(node) / traced_batch(node.graph))


def traced_batch(graph: fx.Graph) -> int:
    """The batch size the graph was traced with."""
    placeholder = next(n for n in graph.nodes if n.op == "placeholder")
    return concrete(placeholder.meta["val"].shape[0])


def concrete(size: Any) -> int:
    """An int from an int or a symbolic size: the value it had in the trace."""
    return size if isinstance(size, int) else int(size.node.hint)


def _numel(node: fx.Node) -> int:
    return math.prod(concrete(s) for s in node.meta["val"].shape)


def _node_macs(gm: fx.GraphModule, node: fx.Node) -> tuple[str, int] | None:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, WEIGHTED):
            return str(node.target), numel_per_sample(node) * module.weight[0].numel()
        return None
    if node.op != "call_function":
        return None
    if node.target in MATMULS:
        inner = concrete(first_input(node).meta["val"].shape[-1])
        return f"{node.meta['path']}:{node.name}", numel_per_sample(node) * inner
    if node.target in _CONVS or node.target is aten.linear.default:
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        return f"{node.meta['path']}:{node.name}", numel_per_sample(node) * math.prod(weight.meta["val"].shape[1:])
    return None
