"""Multiply-accumulates per layer, read off the traced graph."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from flatcompress.graph.remodularize import PRODUCTS
from flatcompress.graph.rewrite import first_input
from flatcompress.graph.tracing import trace

aten = torch.ops.aten
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)
MATMULS = (aten.matmul.default, aten.bmm.default, aten.mm.default)
_RECURRENT = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


def weighted(gm: fx.GraphModule) -> list[fx.Node]:
    """The conv and linear ``call_module`` nodes of ``gm`` in execution order (a shared module appears at each call)."""
    return [n for n in gm.graph.nodes if n.op == "call_module" and isinstance(gm.get_submodule(n.target), WEIGHTED)]


def macs(model: nn.Module, example_input: Any) -> dict[str, int]:
    """Multiply-accumulates per sample of every conv, linear layer and matrix product, by qualified name.

    A matrix product belongs to no module: its key is ``path:node``. Biases, normalisation and activations count
    nothing, as usual. A module called twice counts twice. ``example_input``: [B, ...], any B >= 1.

    >>> macs(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), torch.zeros(1, 3, 4, 4))
    {'0': 3456}
    """
    gm = trace(model, example_input)
    counts: dict[str, int] = {}
    for node in gm.graph.nodes:
        cost = node_macs(gm, node)
        if cost:
            key, count = cost
            counts[key] = counts.get(key, 0) + count
    return counts


def total_macs(model: nn.Module, example_input: Any) -> int:
    """The sum of `macs` over all layers."""
    return sum(macs(model, example_input).values())


def numel_per_sample(node: fx.Node) -> int:
    """Elements of a node's output for one sample; the traced batch may hide in a merged dimension (B*T)."""
    return round(_numel(node) / traced_batch(node.graph))


def traced_batch(graph: fx.Graph) -> int:
    """The batch size the graph was traced with."""
    placeholder = next(n for n in graph.nodes if n.op == "placeholder" and n.meta["val"].dim())
    return concrete(placeholder.meta["val"].shape[0])


def concrete(size: Any) -> int:
    """An int from an int or a symbolic size: the value it had in the trace."""
    return size if isinstance(size, int) else int(size.node.hint)


def _numel(node: fx.Node) -> int:
    return math.prod(concrete(s) for s in node.meta["val"].shape)


def node_macs(gm: fx.GraphModule, node: fx.Node) -> tuple[str, int] | None:
    """(name, multiply-accumulates per sample) of one node; None for one that has none."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if not isinstance(module, WEIGHTED):
            return None
        # a transposed convolution spreads every input value, the others gather every output value
        counted = first_input(node) if isinstance(module, _TRANSPOSED) else node
        return str(node.target), numel_per_sample(counted) * module.weight[0].numel()
    if node.op != "call_function":
        return None
    key = f"{node.meta.get('path', '')}:{node.name}"
    if node.target in MATMULS:
        return key, numel_per_sample(node) * concrete(first_input(node).meta["val"].shape[-1])
    if node.target in PRODUCTS:
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        counted = first_input(node) if "transpose" in str(node.target) else node
        return key, numel_per_sample(counted) * math.prod(concrete(s) for s in weight.meta["val"].shape[1:])
    if node.target in _RECURRENT:
        return str(node.meta.get("path") or node.name), _recurrent_macs(node)
    return None


def _recurrent_macs(node: fx.Node) -> int:
    """Every matrix of a recurrent layer multiplies once a step; the sequence is every dimension but the last."""
    steps = numel_per_sample(first_input(node)) // max(1, concrete(first_input(node).meta["val"].shape[-1]))
    matrices = [p for p in node.args[2] if isinstance(p, fx.Node) and p.meta["val"].dim() == 2]  # type: ignore[union-attr]
    return steps * sum(math.prod(concrete(s) for s in p.meta["val"].shape) for p in matrices)
