"""ReLU and ReLU6 in one piece with the quantizer behind them, in the graph that runs.

Clipping to the quantizer's grid clips below zero as well, so the rectifier's own passes over memory are saved, forward
and backward, and ReLU6's output is not kept (`flatcompress.quant.quantizers.function`); every value is the same. The
graph that `trace` shows still has both operators.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from flatcompress.graph.rewrite import first_input
from flatcompress.quant.quantizers.lsq import StepQuantizer
from flatcompress.quant.quantizers.modules import ActivationQuantizer

aten = torch.ops.aten


def into_quantizers(model: nn.Module, graph: fx.Graph) -> None:
    """Take every rectifier that only a quantizer with a learned step reads into the call of that quantizer."""
    for node in list(graph.nodes):
        if node.op != "call_module" or not _rounds(model.get_submodule(str(node.target))):
            continue
        rectifier = first_input(node)
        most = _most(rectifier)
        if most is not None and len(rectifier.users) == 1:
            node.args = (first_input(rectifier), most)
            graph.erase_node(rectifier)


def _rounds(module: nn.Module) -> bool:
    return isinstance(module, ActivationQuantizer) and type(module.tensor_quant) is StepQuantizer


def _most(node: fx.Node) -> float | None:
    """The upper end of a rectifier that begins at 0, infinite for ReLU; None for any other operator."""
    if node.target is aten.relu.default:
        return math.inf
    if node.target is aten.relu6.default:
        return 6.0
    if node.target is aten.hardtanh.default:
        given: list[Any] = [*node.args[1:], None, None]  # what is left out is no rectifier's
        return None if given[0] != 0 or given[1] is None else float(given[1])
    return None
