"""Drawn C programs: every kind of step at many sizes, widths and shares of zeros, to fit the table of costs on."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from flatcompress.onnx_export.c import ir
from flatcompress.onnx_export.lower.integer import Grid

CHANGES = (
    *("softmax", "gelu", "gelu_tanh", "tanh", "silu", "sigmoid", "hardswish", "hardsigmoid", "relu"),
    *("scale", "divide", "norm", "constant", "times"),
)


class Drawn:
    """One program. ``zeros``: share of weights that are zero."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        kind = ("image", "image", "image", "vector", "rows")[seed % 5]
        self.zeros = float(self.rng.choice([0.0, 0.0, 0.0, 0.5, 0.8, 0.9]))
        self.bits = int(self.rng.choice([2, 3, 4, 4, 5, 6, 8]))
        self.codes = int(self.rng.choice([4, 4, 8]))
        if seed % 10 == 2:
            kind, self.zeros, self.bits = "coded", 0.0, 2
        self.packed = bool(self.rng.random() < 0.25)
        self.dilation = (2, 1 + seed % 2) if seed % 20 in (6, 11) else (1, 1)
        self.late = seed % 10 == 4
        self.program = ir.Program((), ())
        {"image": self._image, "coded": self._coded, "vector": self._vector, "rows": self._rows}[kind]()

    @property
    def input(self) -> np.ndarray:
        """A sample."""
        return self.rng.normal(size=(1, *self.program.inputs)).astype(np.float32)

    def _draw(self, *choices: int) -> int:
        return int(self.rng.choice(choices))

    def _grid(self, bits: int, signed: bool = False) -> Grid:
        scale, half = float(np.float32(self.rng.uniform(4.0, 12.0) / (1 << bits))), 1 << (bits - 1)
        return Grid(scale, 128, 128 - half, 127 + half, bits) if signed else Grid(scale, 0, 0, (1 << bits) - 1, bits)

    def _codes(self, height: int, width: int, channels: int, bits: int | None = None, signed: bool = False) -> ir.Codes:
        grid = self._grid(self.codes if bits is None else bits, signed)
        return ir.Codes(f"t{len(self.program.steps)}", height, width, channels, grid)

    def _put(self, step: ir.Step) -> ir.Tensor:
        step.path = f"step {len(self.program.steps)}"
        self.program.steps.append(step)
        return step.out

    # --- layers -----------------------------------------------------------------------------------------------------

    def _weight(self, shape: tuple[int, ...], bits: int) -> np.ndarray:
        half = 1 << (bits - 1)
        found = np.clip(np.round(self.rng.normal(size=shape) * half / 2.5), -half, half - 1).astype(np.int64)
        if bits > 2 or self.zeros:
            found[found == 0] = 1  # zeros are masked ones
        found[self.rng.random(shape) < self.zeros] = 0
        found.reshape(-1)[0], found.reshape(-1)[-1] = -half, half - 1
        return found

    def _conv(
        self, source: ir.Codes, outputs: int, kernel: tuple[int, int] = (1, 1), stride: int = 1, groups: int = 1,
        out: bool = True, bits: int | None = None,
    ) -> ir.Conv:  # fmt: skip
        pads = self.dilation[0] * (kernel[0] // 2), self.dilation[1] * (kernel[1] // 2)
        reach = [(size - 1) * apart + 1 for size, apart in zip(kernel, self.dilation)]
        sides = zip((source.height, source.width), reach, pads)
        height, width = ((side + 2 * pad - size) // stride + 1 for side, size, pad in sides)
        width_of = self.bits if bits is None else bits
        weight = self._weight((outputs, *kernel, source.channels // groups), width_of)
        result = self._codes(height, width, outputs) if out else None
        top = 2.0 * source.high / 3 * math.sqrt(max(1.0, float((weight.astype(float) ** 2).sum() / outputs)))
        scale = (self.rng.uniform(0.7, 1.3, outputs) * (1 << self.codes) / top).astype(np.float32)
        bias = np.round(self.rng.normal(size=outputs) * top / 8).astype(np.int64)
        if not out:
            scale /= 1 << self.codes
        window = ir.Window(kernel, (stride, stride), self.dilation, pads)
        return ir.Conv("", [source], result, weight, bias, scale, width_of, 0, window, groups, height, width)

    def _image(self) -> None:
        channels, height, width = self._draw(1, 2, 3, 4), self._draw(7, 8, 11, 16, 21), self._draw(5, 8, 12, 16, 23)
        self.program.inputs = (channels, height, width)
        current = self._put(ir.Quantize("", [], self._codes(height, width, channels, 8, signed=True)))
        layers: tuple[Callable[[ir.Codes], ir.Step], ...] = (
            self._full, self._full, self._pointwise, self._depthwise, self._depthwise, self._grouped, self._residual,
            self._separate_add, self._max, self._table, self._concat, self._move, self._gate,
        )  # fmt: skip
        for at in range(self._draw(4, 5, 6, 16)):
            make = self._full if at == 0 else layers[self._draw(*range(len(layers)))]
            current = self._put(make(current))
        end = self._draw(0, 0, 0, 1)
        if end:
            self.program.outputs = (current.channels, current.height, current.width)
            self._put(ir.Dequantize("", [current], None))
            return
        pooled = self._codes(1, 1, current.channels)
        factor = np.float32(1.0 / current.pixels)
        self._ends(self._put(ir.GlobalPool("", [current], pooled, factor)))

    def _coded(self) -> None:
        """Deep layers of two-bit weights, while the arena has room for their decoded rows."""
        self.program.inputs = (3, 20, 20)
        current = self._put(ir.Quantize("", [], self._codes(20, 20, 3, 8, signed=True)))
        current = self._put(self._conv(current, self._draw(24, 32), (3, 3)))
        current = self._put(self._conv(current, self._draw(16, 24), (3, 3), 2))
        for _ in range(self._draw(2, 3, 4)):
            current = self._put(self._conv(current, self._draw(32, 48, 64), (3, 3)))
        self._ends(self._put(ir.GlobalPool("", [current], self._codes(1, 1, current.channels), np.float32(0.01))))

    def _ends(self, current: ir.Codes) -> None:
        last = self._conv(current, self._draw(2, 5, 10), out=False, bits=8)
        self.program.outputs = (last.outputs,)
        self._put(last)

    def _full(self, source: ir.Codes) -> ir.Conv:
        kernel = [(3, 3), (3, 3), (5, 5), (1, 3), (10, 4), (2, 2)][self._draw(*range(6))]
        outputs = self._draw(24, 32, 48, 64) if self.bits == 2 else self._draw(4, 7, 8, 12, 16, 21, 32)
        return self._conv(source, outputs, kernel, self._draw(1, 1, 2))

    def _pointwise(self, source: ir.Codes) -> ir.Conv:
        return self._conv(source, self._draw(4, 8, 13, 16, 32, 64))

    def _depthwise(self, source: ir.Codes) -> ir.Conv:
        kernel = [(3, 3), (3, 3), (3, 3), (5, 5), (1, 3)][self._draw(*range(5))]
        times = self._draw(1, 1, 1, 2) if source.channels < 32 else 1
        return self._conv(source, source.channels * times, kernel, self._draw(1, 1, 2), source.channels)

    def _grouped(self, source: ir.Codes) -> ir.Conv:
        groups = 2 if source.channels % 2 == 0 and source.channels > 2 else 1
        return self._conv(source, self._draw(4, 8, 16), (3, 3), 1, groups)

    def _residual(self, source: ir.Codes) -> ir.Conv:
        made = self._conv(source, source.channels, (3, 3))
        between = self._codes(made.height, made.width, made.outputs, 8, signed=True)
        made.add, made.sources = ir.Fused("", between, source, bool(self._draw(0, 1))), [source, source]
        return made

    def _separate_add(self, source: ir.Codes) -> ir.Step:
        other = self._put(self._pointwise_of(source))
        made = self._put(self._pointwise_of(source))
        return ir.Add("", [other, made], self._codes(source.height, source.width, source.channels))

    def _pointwise_of(self, source: ir.Codes) -> ir.Conv:
        return self._conv(source, source.channels)

    # --- steps without weights --------------------------------------------------------------------------------------

    def _max(self, source: ir.Codes) -> ir.Step:
        window = ir.Window((2, 2), (2, 2)) if self._draw(0, 1) else ir.Window((3, 3), (1, 1), (1, 1), (1, 1))
        height, width = (
            (source.height // 2, source.width // 2) if window.stride[0] == 2 else (source.height, source.width)
        )
        if not height or not width:
            return self._table(source)
        out = ir.Codes(f"t{len(self.program.steps)}", height, width, source.channels, source.grid)
        return ir.MaxPool("", [source], out, window)

    def _table(self, source: ir.Codes) -> ir.Step:
        out = self._codes(source.height, source.width, source.channels)
        return ir.Table("", [source], out, self.rng.integers(0, out.high + 1, source.high + 1).astype(np.uint8))

    def _concat(self, source: ir.Codes) -> ir.Step:
        made = self._conv(source, self._draw(3, 8, 16))
        made.out.grid = source.grid
        second = self._put(made)
        out = self._codes(source.height, source.width, source.channels + second.channels)
        out.grid = source.grid
        return ir.Concat("", [source, second], out)

    def _move(self, source: ir.Codes) -> ir.Step:
        out = ir.Codes(f"t{len(self.program.steps)}", source.width, source.height, source.channels, source.grid)
        loops = [(source.width, source.channels), (source.height, source.width * source.channels), (source.channels, 1)]
        return ir.Move("", [source], out, 0, loops)

    def _gate(self, source: ir.Codes) -> ir.Step:
        pooled = self._put(
            ir.GlobalPool("", [source], self._codes(1, 1, source.channels), np.float32(1 / source.pixels))
        )
        gate = self._put(self._conv(pooled, source.channels))
        out = self._codes(source.height, source.width, source.channels)
        factor = np.float32(1.0 / max(1, gate.high))
        return ir.Gate("", [source, gate], out, factor, ((source.channels, 1), (0, 1)))

    def _vector(self) -> None:
        count = self._draw(24, 64, 100, 256)
        self.program.inputs = (count,)
        current = self._put(ir.Quantize("", [], self._codes(1, 1, count, 8, signed=True)))
        for _ in range(self._draw(2, 3, 4)):
            current = self._put(self._conv(current, self._draw(8, 16, 32, 60, 64, 128)))
        self._ends(current)

    # --- rows of real values ----------------------------------------------------------------------------------------

    def _rows(self) -> None:
        rows, columns = self._draw(8, 16, 25), self._draw(16, 32, 48)
        self.program.inputs = (columns, 1, rows)
        current = self._put(ir.Quantize("", [], self._codes(1, rows, columns, 8, signed=True)))
        for _ in range(self._draw(2, 3, 4)):
            current = self._put(self._row_step(current, rows))
        if self._draw(0, 1):
            current = self._put(self._added(current, rows))
        if self._draw(0, 1):
            out = self._codes(1, 1, current.channels, 8, signed=True)
            self._ends(
                self._put(ir.Rows("", [current], out, rows, out.channels, None, 0, out.channels, [], False, True))
            )
            return
        self.program.outputs = (current.channels, current.height, current.width)
        self._put(ir.Dequantize("", [current], None))

    def _added(self, source: ir.Codes, rows: int) -> ir.Rows:
        """Real values that are kept, and added to those of a layer."""
        columns = source.channels
        held = ir.Real(f"t{len(self.program.steps)}", 1, rows, columns)
        self._put(ir.Rows("", [source], held, rows, columns, None, 0, columns, [self._change(columns)]))
        made = self._conv(source, columns, out=False)
        out = self._codes(1, rows, columns, 8, signed=True)
        return ir.Rows("", [source, held], out, rows, columns, made, 0, columns, [("add", held)])

    def _row_step(self, source: ir.Codes, rows: int) -> ir.Rows:
        begin, columns, sources, count = self._draw(0, 1, 2), source.channels, [source], rows
        made: ir.Conv | ir.Product | None = None
        if begin == 1:
            made = self._conv(source, self._draw(16, 32, 40), out=False)
            columns = made.outputs
            made.late = self.rng.normal(size=columns).astype(np.float32) if self.late else None
        elif begin == 2 and columns % 4 == 0:
            strides = (0, columns // 4, columns, 1)
            factor = np.float32(1 / (5000 * math.sqrt(columns)))
            made = ir.Product(4, rows, rows, columns // 4, strides, strides, factor)
            sources, columns, count = [source, source], rows, 4 * rows
        changes = [self._change(columns) for _ in range(self._draw(1, 2, 3))]
        out = self._codes(1, rows, columns * count // rows, 8, signed=True)
        return ir.Rows("", sources, out, count, columns, made, 0, columns, changes)

    def _change(self, columns: int) -> tuple[str, object]:
        name = CHANGES[self._draw(*range(len(CHANGES)))]
        floats = self.rng.normal(size=columns).astype(np.float32)
        operands = {"scale": np.float32(0.5), "divide": np.float32(3.0), "norm": (floats, floats, np.float32(1e-5))}
        operands |= {"constant": floats, "times": floats}
        return name, operands.get(name)
