"""A program with everything decided: digits, requantization and memory, ready to be written as C."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flatcompress.errors import UserError
from flatcompress.onnx_export.c import choosing, coding, ending, ir, packing, requantize, sums, weights
from flatcompress.onnx_export.c.plan import ALIGNMENT, Plan, lay_out

SMALL = (1 << 8) - 1
LARGE = (1 << 16) - 1
TOGETHER = 144  # pixels of a depthwise layer's plane, as depthwise.h has it
FAR = 1 << 21  # a float below this is rounded by adding 1.5 * 2^23


@dataclass
class Layer:
    """A convolution with its digits, its rule and, where an addition is fused, that one's rule; ``kernel``: see
    `choosing`."""

    step: ir.Conv
    digits: weights.Digits
    rule: requantize.Rule
    bias: requantize.Ints
    kernel: str
    add: sums.AddRule | None = None
    entries: weights.Entries | None = None
    most: float = 0.0  # the largest product of a sum and its scale
    room: int = 0  # by how many bits every sum and product may be raised within 32 bits
    even: int | None = None  # bits by which sums are raised so that all layers end alike (`ending`)
    block: int = 0  # channels whose rows are decoded at a time (`coding`); 0: rows are stored as words

    @property
    def far(self) -> bool:
        """Whether products with a float scale may leave what a float rounds at once."""
        return self.rule.floats and self.most >= FAR

    @property
    def wide(self) -> bool:
        """Whether biases take four bytes each."""
        return bool(self.bias.min() < -(1 << 15) or self.bias.max() >= 1 << 15)

    @property
    def result(self) -> ir.Codes | None:
        """The grid that sums are rounded to, before a fused addition."""
        return self.step.add.between if self.step.add is not None else self.step.out

    @property
    def turned(self) -> bool:
        """Whether a depthwise or sparse layer goes down the columns, because groups of pixels fill those better."""
        if self.entries is not None:
            return self.entries.turned
        height, width = self.step.height, self.step.width
        return self.kernel == choosing.DEPTHWISE and -(-height // 4) * width < -(-width // 4) * height

    @property
    def together(self) -> bool:
        """Whether a depthwise layer hands the sums of all lines of a channel over at once."""
        small = self.step.height * self.step.width <= TOGETHER
        return self.kernel == choosing.DEPTHWISE and not self.turned and small

    @property
    def whole(self) -> bool:
        """Whether a sparse layer gathers all taps of a group of pixels one after the other."""
        return self.entries is not None and self.entries.whole

    @property
    def runs(self) -> bool:
        """Whether a sparse layer gathers its inputs along lines, and not pixel by pixel."""
        return self.entries is not None and (self.entries.runs or self.step.sources[0].packed)

    @property
    def at_once(self) -> int:
        """Columns that a sparse layer makes at once, of two lines."""
        return choosing.COLUMNS // (2 if self.entries is not None and self.entries.form == weights.WIDE else 1)

    @property
    def words(self) -> int:
        """32-bit words of a patch; bytes of a depthwise layer's line; words of a sparse layer's line of a channel."""
        window, width = self.step.window, self.step.width
        if self.kernel == choosing.DEPTHWISE:
            axis = 0 if self.turned else 1
            return _reach(window, axis, self.step.height if self.turned else width)
        if self.kernel == choosing.SPARSE:
            axis = 0 if self.turned else 1
            beyond = (window.kernel[axis] - 1) * window.dilation[axis] // window.stride[axis]
            columns = -(-choosing.shape(self.step)[axis] // choosing.COLUMNS) * choosing.COLUMNS
            return window.stride[axis] * (columns + beyond)
        unit = weights.unit(self.digits.bits)
        return -(-self.step.taps // unit) * unit // 2

    @property
    def scratch(self) -> int:
        """Bytes of patches; of a line's sums, the taps and a channel's plane; of the inputs of two lines."""
        step = self.step
        if self.kernel == choosing.DEPTHWISE:
            axis, size = (1, step.width) if self.turned else (0, step.height)
            along = step.height if self.turned else step.width
            plane = _reach(step.window, axis, size) * self.words + 4 * step.window.stride[1 - axis]
            sums = step.height * step.width + 3 if self.together else -(-along // 4) * 4
            return 4 * (sums + step.taps) + plane
        if self.kernel == choosing.SPARSE:
            parts = max(1, self.entries.parts) if self.entries is not None else 1
            height, width = step.window.kernel[::-1] if self.turned else step.window.kernel
            lines = 4 * (width * parts + height * step.sources[0].channels * self.words)
            return lines + (4 * self.at_once * step.taps if self.whole else 0)
        if self.kernel != choosing.CONV:
            return 0
        return self.decoded_at + self.block * self.words // 2

    @property
    def decoded_at(self) -> int:
        """Where in a dense layer's scratch decoded rows go: behind two patches and what is copied for them."""
        direct = self.step.weight.shape[3] % 4 == 0
        return 2 * 4 * self.words + (0 if direct else -(-self.step.taps // 4) * 4)


def _reach(window: ir.Window, axis: int, size: int) -> int:
    """How many inputs ``size`` outputs see along an axis."""
    return (size - 1) * window.stride[axis] + (window.kernel[axis] - 1) * window.dilation[axis] + 1


@dataclass
class Decided:
    """layers, adds, pools: by the number of their step."""

    program: ir.Program
    plan: Plan
    layers: dict[int, Layer] = field(default_factory=dict)
    adds: dict[int, sums.AddRule] = field(default_factory=dict)
    pools: dict[int, requantize.Rule] = field(default_factory=dict)

    @property
    def ranks(self) -> requantize.Ints:
        """The digits of two-bit weights, the commonest first."""
        return coding.ranks(layer.digits for layer in self.layers.values() if layer.digits.bits == 2)

    @property
    def packed(self) -> bool:
        """Whether any tensor has two codes to a byte."""
        return any(isinstance(tensor, ir.Codes) and tensor.packed for tensor in self.program.tensors)

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


def decide(program: ir.Program, pack_activations: bool = False) -> Decided:
    """Digits, rules and the plan. UserError where a number does not fit its place in the C.

    pack_activations: tensors whose codes take up to 4 bits lie two to a byte where their steps can (`packing`).
    """
    layers, adds, pools = {}, {}, {}
    convs = [(conv, weights.digits(conv)) for conv in program.convs]
    chosen = iter(list(zip(convs, choosing.choose(convs))))
    for index, step in enumerate(program.steps):
        if step.convolution is not None:
            (conv, found), choice = next(chosen)
            layers[index] = _layer(conv, found, choice)
        elif isinstance(step, ir.Add):
            assert step.out is not None
            adds[index] = sums.solve_add(step.sources[0], step.sources[1], step.out)
        elif isinstance(step, ir.GlobalPool):
            pools[index] = _pool(step)
    ending.even_out(layers.values())
    _check_sizes(program)
    if pack_activations:
        packing.pack(program, {index: layer.kernel for index, layer in layers.items()})
    return Decided(program, _plan(program, layers), layers, adds, pools)


def _plan(program: ir.Program, layers: dict[int, Layer]) -> Plan:
    """Where everything lies, with rows of weights coded where that takes no byte more."""
    plan = lay_out(program, _scratch(program, layers))
    if coding.choose(program, layers, plan):
        coded = lay_out(program, _scratch(program, layers))
        if coded.arena <= plan.arena:
            return coded
        coding.drop(layers)
    return plan


def _scratch(program: ir.Program, layers: dict[int, Layer]) -> list[int]:
    """Bytes of each step's."""
    return [
        row_bytes(step) + (layers[index].scratch if index in layers else 0) for index, step in enumerate(program.steps)
    ]


def row_bytes(step: ir.Step) -> int:
    """Of the real values that a step has at hand, before a convolution's own scratch."""
    if not isinstance(step, ir.Rows):
        return 0
    rows = step.convolution.pixels if step.convolution is not None else 1
    return -(-4 * step.columns * (rows + int(step.mean)) // ALIGNMENT) * ALIGNMENT


def _layer(step: ir.Conv, found: weights.Digits, choice: choosing.Choice) -> Layer:
    source, (kernel, entries) = step.sources[0], choice
    grid = source.grid
    low, high = requantize.reachable(
        step.weight, step.bias, step.headroom, grid.low - grid.zero_point, grid.high - grid.zero_point
    )
    _check_sums(step, found, low, high)
    # Kernels take codes, not codes less their zero: the zero's share of a sum is known.
    corrected = step.bias - source.zero * (step.weight.reshape(step.outputs, -1).sum(1) << step.headroom)
    corrected = corrected * found.signs
    result = step.add.between if step.add is not None else step.out
    if result is None:
        rule = requantize.Rule(np.zeros(step.outputs, np.int64), 0, 32, 0, 0)
        return Layer(step, found, rule, corrected, kernel, entries=entries)
    limits = result.grid.low - result.grid.zero_point, result.grid.high - result.grid.zero_point
    every = 1 << step.headroom
    rule = requantize.solve(step.scale, low, high, *limits, signs=found.signs, every=every, raisable=True)
    most = float((np.maximum(high, -low) * step.scale.astype(np.float64)).max())
    room = requantize.room(step.scale, low, high)
    added = None
    if step.add is not None:
        assert step.out is not None
        operands = (step.add.between, step.add.other) if step.add.first else (step.add.other, step.add.between)
        added = sums.solve_add(*operands, step.out)
    return Layer(step, found, rule, corrected, kernel, added, entries, most, room)


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
