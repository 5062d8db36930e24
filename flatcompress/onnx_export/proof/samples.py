"""What a certificate is measured on: batches of any number of inputs, and the output that is judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from flatcompress.errors import UserError
from flatcompress.graph.interface import KEY, arguments
from flatcompress.onnx_export.emit.writer import input_names, output_names

Inputs = tuple[Tensor, ...]


class Samples:
    """A test set as the reference and the file take it.

    ``names``: of the file's inputs, in order. ``batched``: which of them begin with the batch; another (positions, a
    constant) is the same in every batch. ``batches``: the inputs on the CPU, real ones as float32.
    """

    def __init__(self, reference: fx.GraphModule, batches: Sequence[Any]) -> None:
        nodes = [node for node in reference.graph.nodes if node.op == "placeholder"]
        self.names = list(input_names(reference).values())
        self.batched = [0 in node.meta.get("dynamic", {0}) for node in nodes]
        if not any(self.batched):
            raise UserError("none of the file's inputs has a batch dimension; there is nothing to certify it on.")
        self.batches = [self._inputs(reference, batch) for batch in batches]
        if not self.batches or not all(self.count(batch) for batch in self.batches):
            raise UserError("certify needs at least one non-empty batch of test inputs.")
        self._check()

    def _inputs(self, reference: fx.GraphModule, batch: Any) -> Inputs:
        """The graph's inputs of one batch: a tensor, a tuple of arguments or a dictionary of them."""
        if isinstance(batch, Tensor) or KEY not in reference.meta:
            found = [batch] if isinstance(batch, Tensor) else list(batch)
        else:
            found = reference.meta[KEY].inputs(*arguments(batch))
        if len(found) != len(self.names):
            raise UserError(f"a batch has {len(found)} inputs; the file takes {', '.join(self.names)}.")
        plain = (value.detach().cpu() for value in found)
        return tuple(value.float() if value.is_floating_point() else value for value in plain)

    def _check(self) -> None:
        """Inputs that belong together, and constants that are none."""
        for batch in self.batches:
            sizes = {len(value) for value, whole in zip(batch, self.batched) if whole}
            if len(sizes) != 1:
                raise UserError(f"the inputs of a batch have {', '.join(map(str, sorted(sizes)))} samples.")
            for name, value, first, whole in zip(self.names, batch, self.batches[0], self.batched):
                if not whole and not torch.equal(value, first):
                    raise UserError(f"input {name!r} has no batch dimension, and two batches give it other values.")

    def count(self, batch: Inputs) -> int:
        """How many samples a batch has."""
        return len(next(value for value, whole in zip(batch, self.batched) if whole))

    def __len__(self) -> int:
        return sum(self.count(batch) for batch in self.batches)

    def chosen(self, indices: Tensor, of: Inputs | None = None) -> Inputs:
        """The samples [indices] of all batches, or of ``of``, as one batch."""
        whole = self.joined() if of is None else of
        return tuple(value[indices] if batched else value for value, batched in zip(whole, self.batched))

    def joined(self) -> Inputs:
        """All batches as one."""
        columns = zip(*self.batches)
        return tuple(torch.cat(list(c)) if batched else next(iter(c)) for c, batched in zip(columns, self.batched))

    def arrays(self) -> list[tuple[NDArray[Any], ...]]:
        """The batches as onnxruntime takes them."""
        return [tuple(value.numpy() for value in batch) for batch in self.batches]


def flat(result: Any) -> list[Any]:
    """A graph's outputs in order."""
    return list(result) if isinstance(result, tuple | list) else [result]


def judged(reference: fx.GraphModule) -> tuple[int, str]:
    """Number and name of the output that a certificate is about: ``logits``, or else the first real one.

    UserError when no output is real.
    """
    results = flat(next(node for node in reversed(reference.graph.nodes) if node.op == "output").args[0])
    names = output_names(reference, len(results))
    real = [i for i, node in enumerate(results) if node.meta.get("dtype", torch.float32).is_floating_point]
    if not real:
        raise UserError("the file has no real-valued output; there is nothing to certify.")
    index = next((i for i in real if names[i] == "logits"), real[0])
    return index, names[index]
