"""The blocks of a network: what lies between two points that a single tensor crosses (BRECQ, arXiv 2102.05426, 3.2).

A residual block is one block, because its shortcut crosses every point inside; in a plain chain every layer is one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from flatcompress.quant.ptq.paths import Paths

aten = torch.ops.aten


def blocks(paths: Paths) -> list[list[fx.Node]]:
    """The graph's nodes in order, in blocks that hold at least one quantized layer each."""
    segments: list[list[fx.Node]] = [[]]
    for node, cut in zip(paths.nodes, _cuts(paths)):
        segments[-1].append(node)
        if cut:
            segments.append([])
    found: list[list[fx.Node]] = []
    for segment in segments:
        # What has no layer (BatchNorm, activation, quantizer) belongs to the block that it ends.
        if found and (not _has_layer(paths, segment) or not _has_layer(paths, found[-1])):
            found[-1] += segment
        else:
            found.append(segment)
    return found


def _has_layer(paths: Paths, nodes: list[fx.Node]) -> bool:
    return any(paths.layer(node) is not None for node in nodes)


def _cuts(paths: Paths) -> list[bool]:
    """For every node whether exactly one batch of values is still to be read after it, its own."""
    last: dict[fx.Node, int] = {}
    for index, node in enumerate(paths.nodes):
        for source in node.all_input_nodes:
            last[source] = index
    batch = next(_first_side(n) for n in paths.nodes if n.op == "placeholder")
    live: set[fx.Node] = set()
    found = []
    for index, node in enumerate(paths.nodes):
        live = {n for n in live if last[n] > index}
        if _carries(node) and last.get(node, -1) > index:
            live.add(node)
        found.append(live == {node} and _first_side(node) == batch)
    return found


def _carries(node: fx.Node) -> bool:
    return node.op not in ("get_attr", "output") and node.target is not aten.sym_size.int


def _first_side(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return str(value.shape[0]) if isinstance(value, torch.Tensor) and value.dim() else None
