"""The network that an ONNX graph becomes: its layers as submodules, its other nodes run in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn


@dataclass(frozen=True)
class Slot:
    """Where a value comes from: ``kind`` "value" (a tensor that was computed), "state" (a buffer or parameter of this
    module) or "plain" (a number, whole numbers, or None for an input left out)."""

    kind: str
    content: Any = None


@dataclass(frozen=True)
class Step:
    """One node. ``layer``: a submodule's path, or "" where ``function`` runs with ``attributes``."""

    name: str
    outputs: tuple[str, ...]
    inputs: tuple[Slot, ...]
    layer: str = ""
    function: Callable[..., Any] | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    last_use: tuple[str, ...] = ()


class OnnxModule(nn.Module):
    """A network read from an ONNX file. It takes the file's inputs in their order and returns its outputs, one tensor
    or a tuple; ``input_names`` and ``output_names`` are the file's."""

    def __init__(self, input_names: list[str], output_names: list[str]) -> None:
        super().__init__()
        self.input_names, self.output_names = list(input_names), list(output_names)
        self.steps: list[Step] = []
        self.sources: list[Slot] = []

    def forward(self, *inputs: Tensor) -> Any:
        return self._run(inputs)

    def _run(self, inputs: tuple[Tensor, ...]) -> Any:
        if len(inputs) != len(self.input_names):
            raise TypeError(f"{len(inputs)} inputs given; the network takes {', '.join(self.input_names)}.")
        values: dict[str, Any] = dict(zip(self.input_names, inputs))
        for step in self.steps:
            result = self.run_step(step, values)
            results = result if isinstance(result, tuple) else (result,)
            values.update(zip(step.outputs, results))
            for name in step.last_use:
                values.pop(name, None)
        found = [self.value(source, values) for source in self.sources]
        return found[0] if len(found) == 1 else tuple(found)

    def run_step(self, step: Step, values: dict[str, Any]) -> Any:
        """The result of one node, or a tuple of results."""
        inputs = [self.value(slot, values) for slot in step.inputs]
        if step.layer:
            return self.get_submodule(step.layer)(*inputs)
        assert step.function is not None
        return step.function(step.attributes, *inputs)

    def value(self, slot: Slot, values: dict[str, Any]) -> Any:
        """What a slot stands for now."""
        if slot.kind == "value":
            return values[slot.content]
        if slot.kind == "state":
            owner, _, name = slot.content.rpartition(".")
            return getattr(self.get_submodule(owner), name)
        return slot.content


class OneInput(OnnxModule):
    """The same with one input, which tools that look at a forward's signature understand best."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return self._run((x,))


def plain(values: np.ndarray) -> Any:
    """A constant as a step holds it: whole numbers as they are, a single real number as a number."""
    return float(values.reshape(-1)[0]) if values.dtype.kind == "f" else values
