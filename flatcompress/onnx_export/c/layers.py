"""A program with everything decided: digits, requantization and memory, ready to be written as C."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flatcompress.errors import UserError
from flatcompress.onnx_export.c import ir, requantize, sums, weights
from flatcompress.onnx_export.c.plan import ALIGNMENT, Plan, lay_out

SMALL = (1 << 8) - 1
LARGE = (1 << 16) - 1


@dataclass
class Layer:
    """A convolution with its digits, its rule and, where an addition is fused, that one's rule."""

    step: ir.Conv
    digits: weights.Digits
    rule: requantize.Rule
    bias: requantize.Ints
    add: sums.AddRule | None = None
    entries: weights.Entries | None = None

    @property
    def words(self) -> int:
        """32-bit words of a patch; for a depthwise layer, 16-bit numbers of a padded row."""
        if self.step.depthwise:
            window, source = self.step.window, self.step.sources[0]
            reach = (self.step.width - 1) * window.stride[1] + (window.kernel[1] - 1) * window.dilation[1] + 1
            return max(window.pads[1] + source.width, reach)
        unit = weights.unit(self.digits.bits)
        return -(-self.step.taps // unit) * unit // 2

    @property
    def scratch(self) -> int:
        """Bytes of patches, or of the ring of rows and the taps."""
        if self.step.depthwise:
            span = (self.step.window.kernel[0] - 1) * self.step.window.dilation[0] + 1
            return 2 * (span * self.words + self.step.taps)
        if self.entries is not None:
            return 16 * self.step.taps
        direct = self.step.weight.shape[3] % 4 == 0
        return 2 * 4 * self.words + (0 if direct else -(-self.step.taps // 4) * 4)


@dataclass
class Decided:
    """layers, adds, pools: by the number of their step."""

    program: ir.Program
    plan: Plan
    layers: dict[int, Layer] = field(default_factory=dict)
    adds: dict[int, sums.AddRule] = field(default_factory=dict)
    pools: dict[int, requantize.Rule] = field(default_factory=dict)

    def proof(self) -> dict[str, Any]:
        """What was proved, for the certificate."""
        rules = [layer.rule for layer in self.layers.values() if layer.step.out is not None]
        floats = self.program.floats
        added = [*self.adds.values(), *(layer.add for layer in self.layers.values() if layer.add is not None)]
        return {
            "channels": sum(len(rule.multiplier) for rule in rules),
            "channels_float": sum(len(rule.multiplier) for rule in rules if rule.floats),
            "sums": sum(rule.sums for rule in [*rules, *self.pools.values()]),
            "steps": sum(rule.steps for rule in [*rules, *self.pools.values()]),
            "pools": len(self.pools),
            "additions": len(added),
            "additions_float": sum(rule.floats for rule in added),
            "pairs": sum(rule.pairs for rule in added),
            "pairs_without_fma": sum(rule.unfused for rule in added),
            "float_steps": [{"module": s.path, "computes": [name for name, _ in s.changes]} for s in floats],
        }


def decide(program: ir.Program) -> Decided:
    """Digits, rules and the plan. UserError where a number does not fit its place in the C."""
    layers, adds, pools = {}, {}, {}
    for index, step in enumerate(program.steps):
        if step.convolution is not None:
            layers[index] = _layer(step.convolution)
        elif isinstance(step, ir.Add):
            assert step.out is not None
            adds[index] = sums.solve_add(step.sources[0], step.sources[1], step.out)
        elif isinstance(step, ir.GlobalPool):
            pools[index] = _pool(step)
    _check_sizes(program)
    scratch = [
        row_bytes(step) + (layers[index].scratch if index in layers else 0) for index, step in enumerate(program.steps)
    ]
    return Decided(program, lay_out(program, scratch), layers, adds, pools)


def row_bytes(step: ir.Step) -> int:
    """Of the real values that a step has at hand, before a convolution's own scratch."""
    if not isinstance(step, ir.Rows):
        return 0
    rows = step.convolution.pixels if step.convolution is not None else 1
    return -(-4 * step.columns * (rows + int(step.mean)) // ALIGNMENT) * ALIGNMENT


# Instructions on an emulated Cortex-M4: a product of the dense kernel; of the sparse ones, where a weight is not zero.
DENSE, SPARSE = 1.2, {weights.WIDE: 3.5, weights.BITS: 2.8, weights.BYTES: 1.7}
SMALLER = 0.7  # of the dense bytes: flash that is worth half as many instructions again


def _sparse(step: ir.Conv, found: weights.Digits) -> weights.Entries | None:
    """The stream of a layer that takes fewer instructions, and not more bytes, without its zeros."""
    if step.groups > 1 or found.lowest > 0 or found.lowest + (1 << found.bits) <= 0:
        return None
    made = weights.entries(found, step.sources[0].high)
    dense = weights.rows(found).nbytes
    pixels = step.height * step.width
    cost = made.count * SPARSE[made.pairs] * (-(-pixels // 8) * 8 / pixels)
    worth = 1.5 if len(made.stream) < SMALLER * dense else 1.0
    step.pixels = 8 if len(made.stream) <= dense and cost < worth * DENSE * step.weight.size else 2
    return made if step.pixels == 8 else None


def _layer(step: ir.Conv) -> Layer:
    source, found = step.sources[0], weights.digits(step)
    grid, entries = source.grid, _sparse(step, found)
    low, high = requantize.reachable(
        step.weight, step.bias, step.headroom, grid.low - grid.zero_point, grid.high - grid.zero_point
    )
    _check_sums(step, found, low, high)
    # The patch holds codes, not codes less their zero: the zero's share of a sum is known.
    zero = 0 if step.depthwise else source.zero
    corrected = (step.bias - zero * (step.weight.reshape(step.outputs, -1).sum(1) << step.headroom)) * found.signs
    result = step.add.between if step.add is not None else step.out
    if result is None:
        rule = requantize.Rule(np.zeros(step.outputs, np.int64), 0, 32, 0, 0)
        return Layer(step, found, rule, corrected, entries=entries)
    limits = result.grid.low - result.grid.zero_point, result.grid.high - result.grid.zero_point
    rule = requantize.solve(step.scale, low, high, *limits, signs=found.signs)
    added = None
    if step.add is not None:
        assert step.out is not None
        operands = (step.add.between, step.add.other) if step.add.first else (step.add.other, step.add.between)
        added = sums.solve_add(*operands, step.out)
    return Layer(step, found, rule, corrected, added, entries)


def _pool(step: ir.GlobalPool) -> requantize.Rule:
    source, out = step.sources[0], step.out
    assert out is not None
    ends = [source.pixels * (code - source.grid.zero_point) for code in (source.grid.low, source.grid.high)]
    low, high = (np.array([end], np.int64) for end in ends)
    limits = out.grid.low - out.grid.zero_point, out.grid.high - out.grid.zero_point
    return requantize.solve(np.array([step.factor], np.float32), low, high, *limits)


def _check_sums(step: ir.Conv, found: weights.Digits, low: requantize.Ints, high: requantize.Ints) -> None:
    most = step.taps * SMALL * max(abs(found.lowest), (1 << found.bits) - 1) << step.headroom
    reach = max(int(high.max()), -int(low.min()), most + int(np.abs(step.bias).max()))
    if reach > requantize.INT32[1]:
        raise UserError(f"module {step.path!r}: a sum of {step.taps} products can leave int32; profile 'c' needs it.")


def _check_sizes(program: ir.Program) -> None:
    for step in program.steps:
        for tensor in [*step.sources, *([step.out] if step.out is not None else [])]:
            if max(tensor.height, tensor.width, tensor.channels) > LARGE:
                raise UserError(f"module {step.path!r}: a tensor has a side of more than {LARGE}.")
        step = step.convolution or step
        window = getattr(step, "window", None)
        if window is None:
            continue
        linear = isinstance(step, ir.Conv) and (step.height, step.width) == (1, 1)
        numbers = [*window.kernel, *window.stride, *window.dilation, *window.pads]
        if max(numbers) > SMALL or (isinstance(step, ir.Conv) and step.taps > LARGE):
            what = "a flattened image" if linear else "a kernel, stride or padding"
            raise UserError(f"module {step.path!r}: {what} is larger than the C kernels take ({SMALL}).")
