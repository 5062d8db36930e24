"""Every value's shape and type in a lowered graph, and which of its sizes differ from call to call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx


class _Shapes(fx.Interpreter):
    """Runs the graph and notes every tensor's shape and type; dimensions that another run finds larger are open."""

    def __init__(self, gm: fx.GraphModule, again: bool) -> None:
        super().__init__(gm)
        self.again = again

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            shape = tuple(result.shape)
            if self.again:
                n.meta["dynamic"] = {axis for axis, size in enumerate(n.meta["shape"]) if shape[axis] != size}
            else:
                n.meta["shape"], n.meta["dtype"] = shape, result.dtype
        elif isinstance(result, int) and not self.again:
            n.meta["size"] = result
        return result


def note_shapes(lowered: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Run twice, with two and with three samples: what differs follows the batch. ``inputs``: one tensor per input."""
    batch = next((len(x) for x in inputs if x.dim()), 1)
    for again in (False, True):
        with torch.no_grad():
            _Shapes(lowered, again).run(*(_repeated(x, batch, 2 + int(again)) for x in inputs))


def _repeated(x: Tensor, batch: int, count: int) -> Tensor:
    """x with ``count`` samples, where its first dimension is the batch."""
    x = x.detach().cpu()
    x = x.float() if x.is_floating_point() else x
    return x[torch.arange(count) % batch] if x.dim() and len(x) == batch else x
