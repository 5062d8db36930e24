"""The same program with other numbers of channels, for what it would cost: no weights, the same kernels and plan.

Budgets ask for hundreds of widths of one network. A program that was read once is resized without its weights: shapes
follow from the layers' outputs, and `plan` and `costs` are the ones that a written model goes through.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flatcompress.errors import UserError
from flatcompress.onnx_export.c import choosing, costs, ir, weights, work
from flatcompress.onnx_export.c.layer_text import uses_of
from flatcompress.onnx_export.c.layers import Decided, Layer
from flatcompress.onnx_export.c.plan import Plan, lay_out

WIDE = 1 << 20  # a bias that takes four bytes


@dataclass(frozen=True)
class Sketch:
    """A decided program, and what its code is made of; of that only the layers' own kernels change with the widths."""

    decided: Decided
    parts: Counter[str]

    @classmethod
    def of(cls, decided: Decided) -> Sketch:
        """UserError for steps whose shapes do not follow from the layers' outputs, naming the module."""
        for step in decided.program.steps:
            if type(step) not in _WIDTHS and not isinstance(step, ir.Conv | ir.Quantize | ir.Dequantize):
                raise UserError(
                    f"module {step.path!r}: flash, RAM and instructions at other widths are known of convolutions, "
                    f"linear layers, additions, pools and gates, not of a {work.kind(step)} step. Take a "
                    "budget of macs, params or bytes."
                )
        return cls(decided, costs.parts(decided))

    @property
    def modules(self) -> set[str]:
        """The paths of its convolutions and linear layers."""
        return {layer.step.path for layer in self.decided.layers.values()}

    def at(self, outputs: Mapping[str, int], planned: bool = True) -> costs.Estimate:
        """The estimate where layers have so many output channels (by path). planned: RAM too, which takes longest."""
        made = resized(self.decided, outputs, planned)
        parts = self.parts - _kernels(self.decided) | _kernels(made)
        return costs.with_code(made, parts)


def _kernels(decided: Decided) -> Counter[str]:
    """The parts of the kernels that layers need by themselves."""
    found = {part for layer in decided.layers.values() for part in uses_of(layer)}
    return Counter({f"part {name}": 1 for name in found})


def resized(decided: Decided, outputs: Mapping[str, int], planned: bool = True) -> Decided:
    """The program with layers of so many outputs, by path; layers that skip zeros become dense."""
    program = ir.Program(decided.program.inputs, decided.program.outputs)
    old: dict[str, Any] = {tensor.name: tensor for tensor in decided.program.tensors}
    new: dict[str, Any] = {}
    convs: dict[int, ir.Conv] = {}
    for index, step in enumerate(decided.program.steps):
        sources = [_view(source, old[source.name], new[source.name]) for source in step.sources]
        if isinstance(step, ir.Conv):
            made: ir.Step = _conv(step, sources, outputs.get(step.path, step.outputs))
            convs[index] = made  # type: ignore[assignment]
        else:
            width = _WIDTHS[type(step)](sources) if type(step) in _WIDTHS else None
            out = step.out if width is None or step.out is None else replace(step.out, channels=width)
            made = replace(step, sources=sources, out=out)
        if made.out is not None:
            new[made.out.name] = made.out
        program.steps.append(made)
    layers = _layers(decided, convs)
    scratch = [layers[index].scratch if index in layers else 0 for index in range(len(program.steps))]
    plan = lay_out(program, scratch) if planned else Plan(0, 0, {}, [], scratch)
    return Decided(program, plan, layers, decided.adds, decided.pools)


def _view(source: ir.Codes, old: ir.Codes, new: ir.Codes) -> ir.Codes:
    """A source at its new size, as the step that reads it sees it."""
    if (source.height, source.width, source.channels) == (old.height, old.width, old.channels):
        return replace(new, grid=source.grid)
    return replace(new, grid=source.grid, height=1, width=1, channels=new.bytes)


def _conv(step: ir.Conv, sources: list[ir.Codes], outputs: int) -> ir.Conv:
    depth, groups = sources[0].channels, step.groups
    if step.depthwise:
        times = step.outputs // step.sources[0].channels
        outputs, groups, depth = depth * times, depth, 1
    elif groups > 1:
        groups, depth = depth // step.weight.shape[3], step.weight.shape[3]
    weight = np.broadcast_to(np.int64(-(1 << (step.bits - 1))), (outputs, *step.window.kernel, depth))
    out = None if step.out is None else replace(step.out, channels=outputs)
    made = replace(step, sources=sources, out=out, weight=weight, groups=groups, pixels=1)
    if step.add is not None:
        other = next(source for source in sources[::-1] if source.name == step.add.other.name)
        made.add = replace(step.add, between=replace(step.add.between, channels=outputs), other=other)
    return made


def _layers(decided: Decided, convs: Mapping[int, ir.Conv]) -> dict[int, Layer]:
    bits = [decided.layers[index].digits.bits for index in convs]
    kernels = choosing.dense(list(convs.values()), bits)
    layers = {}
    for (index, step), width, kernel in zip(convs.items(), bits, kernels):
        step.pixels = 2 if kernel == choosing.CONV else 1
        outputs, before = step.outputs, decided.layers[index]
        digits = weights.Digits(
            np.broadcast_to(np.int64(0), (outputs, step.taps)), -1, width, np.broadcast_to(np.int64(1), outputs)
        )
        bias = np.broadcast_to(np.int64(WIDE if before.wide else 0), outputs)
        layers[index] = Layer(step, digits, before.rule, bias, kernel, before.add, even=before.even)
    return layers


def _first(sources: list[ir.Codes]) -> int:
    return sources[0].channels


_WIDTHS: dict[type, Any] = {
    ir.Add: _first,
    ir.GlobalPool: _first,
    ir.MaxPool: _first,
    ir.Table: _first,
    ir.Concat: lambda sources: sum(source.channels for source in sources),
    ir.Gate: lambda sources: max(source.channels for source in sources),
}
