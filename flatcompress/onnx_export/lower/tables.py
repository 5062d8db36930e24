"""Functions of one quantized tensor: which are worth a table of 256 codes, and the table.

Between two quantizers an elementwise function maps at most 256 codes to codes. onnxruntime runs most of them fastest as
they are, floats between DequantizeLinear and QuantizeLinear: 0.5 to 4 ns a value with one thread, where Cast and
Gather from a table take 10 to 11 (Gather has no byte indices; `python -m benchmarks.export_activations`). A table pays
where the functions together cost more than that: Softplus, and with it Mish and log-sigmoid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from flatcompress.graph import pointwise
from flatcompress.onnx_export.lower import integer
from flatcompress.onnx_export.lower.integer import Grid

aten = torch.ops.aten
TABLE = 10.0  # nanoseconds a value, Cast and Gather
# Measured likewise; what is not listed takes less than one.
COST: dict[Any, float] = {
    aten.softplus.default: 16.0,
    aten.mish.default: 17.0,
    aten.log_sigmoid.default: 16.0,
    aten.elu.default: 4.0,
    aten.celu.default: 4.5,
    aten.selu.default: 4.0,
    aten.gelu.default: 3.2,
}


def root_of(node: fx.Node, quantized: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The quantized tensor that ``node`` is a slow function of, when a table is faster; else None."""
    root = pointwise.function_of_one(node, lambda n: n.op != "get_attr")
    if root is None or not quantized(root):
        return None
    return root if sum(COST.get(n.target, 0.0) for n in pointwise.between(root, node)) > TABLE else None


def tabulate(gm: fx.GraphModule, root: fx.Node, node: fx.Node, first: Grid, out: Grid) -> integer.Table:
    """The table from codes of ``root`` (grid ``first``) to those of a quantizer behind ``node`` (grid ``out``)."""
    known: dict[fx.Node, Any] = {root: integer.Dequantize(first)(torch.arange(256, dtype=torch.float32))}

    def value(source: fx.Node) -> Any:
        if source not in known:
            known[source] = _attribute(gm, str(source.target)).reshape(-1)
        return known[source]

    with torch.no_grad():
        for step in pointwise.between(root, node):
            args, kwargs = fx.map_arg((step.args, step.kwargs), value)  # type: ignore[misc]
            known[step] = step.target(*args, **kwargs)  # type: ignore[operator]
        return integer.Table(integer.Quantize(out)(known[node]), first, out)


def _attribute(gm: fx.GraphModule, target: str) -> Tensor:
    owner, _, name = target.rpartition(".")
    return getattr(gm.get_submodule(owner), name).detach()
