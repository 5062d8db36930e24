"""Random numbers in a training forward: gathered into modules that do nothing in eval mode.

Stochastic depth multiplies a branch by a random mask, a denoising model adds noise to its input. In a graph of the
training forward such a tensor is made of random operators and sizes alone, and joins the data in one multiplication
or addition. That join and all that leads to it become one `TrainingNoise`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from flatcompress.graph.runtime import HOLDER
from flatcompress.graph.standins import TrainingNoise

aten = torch.ops.aten
# what reads a tensor for its shape, dtype or device only
_SHAPE_ONLY = (
    "aten.sym_size", "aten.new_empty", "aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.empty_like",
    "aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.rand_like", "aten.randn_like",
)  # fmt: skip
_JOINS = {aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor}
_SCALINGS = {aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar}


def random_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The operators that draw random numbers."""
    tag = torch.Tag.nondeterministic_seeded
    drawn = [n for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    return [n for n in drawn if tag in n.target.tags]  # type: ignore[union-attr]


def gather(gm: fx.GraphModule, scaled: bool) -> None:
    """Replace every join of data and noise by a `TrainingNoise`; what is not of this kind stays.

    ``scaled``: a scaling of the data by a number right before the join (``x / keep * mask``) belongs to it.
    """
    data, noise = _sorted(gm.graph)
    for node in list(gm.graph.nodes):
        if node.target not in _JOINS or node not in data or len(node.args) < 2:
            continue
        first, second = node.args[:2]
        if second in noise and first in data:
            _replace(gm, node, first, noise, scaled)
        elif first in noise and second in data and node.target is not aten.div.Tensor:
            _replace(gm, node, second, noise, scaled)
    for node in reversed(list(gm.graph.nodes)):  # fx keeps random operators as if they had effects
        if node in noise and not node.users:
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()


def _sorted(graph: fx.Graph) -> tuple[set[fx.Node], set[fx.Node]]:
    """Nodes with values of the network's input, and nodes of random numbers without any."""
    data: set[fx.Node] = set()
    noise: set[fx.Node] = set()
    drawn = set(random_nodes(graph))
    for node in graph.nodes:
        shape_only = str(node.target).startswith(_SHAPE_ONLY)
        if node.op == "placeholder" or (not shape_only and any(n in data for n in node.all_input_nodes)):
            data.add(node)
        elif node in drawn or any(n in noise for n in node.all_input_nodes):
            noise.add(node)
    return data, noise


def _replace(gm: fx.GraphModule, join: fx.Node, x: Any, noise: set[fx.Node], scaled: bool) -> None:
    start = x
    if scaled and x.target in _SCALINGS and isinstance(x.args[1], int | float) and len(x.users) == 1:
        start = x.args[0]
    inside: set[fx.Node] = set()
    stack = [join]
    while stack:
        node = stack.pop()
        if node is start or node in inside or (node not in noise and node not in (join, x)):
            continue
        inside.add(node)
        stack.extend(node.all_input_nodes)
    ordered = [n for n in gm.graph.nodes if n in inside]
    outer = list(
        dict.fromkeys(n for node in ordered for n in node.all_input_nodes if n not in inside and n is not start)
    )
    module = TrainingNoise(_extracted(gm, ordered, start, outer))
    count = sum(1 for n in gm.graph.nodes if "training_noise" in str(n.target))
    name = f"{HOLDER}.training_noise_{count}"
    _holder(gm).add_module(f"training_noise_{count}", module)
    with gm.graph.inserting_before(join):
        made = gm.graph.call_module(name, (start, *outer))
    made.meta.update(join.meta)
    join.replace_all_uses_with(made)
    gm.graph.erase_node(join)


def _extracted(gm: fx.GraphModule, nodes: list[fx.Node], start: fx.Node, outer: list[fx.Node]) -> nn.Module:
    graph = fx.Graph()
    env = {node: graph.placeholder(f"input_{i}") for i, node in enumerate([start, *outer])}
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(env[nodes[-1]])
    return fx.GraphModule(nn.Module(), graph)


def _holder(gm: fx.GraphModule) -> nn.Module:
    if not hasattr(gm, HOLDER):
        gm.add_module(HOLDER, nn.Module())
    return getattr(gm, HOLDER)
