"""What a C program is made of: tensors of codes in one arena, and a list of steps over them.

Plain data between `read`, which makes it of a lowered graph, and `plan`, `requantize` and `emit`, which turn it into
memory, integers and C. Tensors lie channels last ([height, width, channels], a vector is [1, 1, channels]).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatcompress.onnx_export.lower.integer import Grid


@dataclass(eq=False)
class Codes:
    """A tensor as it lies in the arena: a byte for each code, counted from the grid's lowest one.

    ``base`` is the uint8 code of the ONNX file that the byte 0 stands for: a grid's lowest code, or its zero point
    where that lies lower, because padding is stored too. ``packed``: two codes to a byte, the first in its lower half;
    every pixel begins with a byte (`packing`).
    """

    name: str
    height: int
    width: int
    channels: int
    grid: Grid
    packed: bool = False

    @property
    def base(self) -> int:
        return min(self.grid.low, self.grid.zero_point)

    @property
    def zero(self) -> int:
        """The byte that stands for the real value 0."""
        return self.grid.zero_point - self.base

    @property
    def low(self) -> int:
        return self.grid.low - self.base

    @property
    def high(self) -> int:
        return self.grid.high - self.base

    @property
    def pixel_bytes(self) -> int:
        return -(-self.channels // 2) if self.packed else self.channels

    @property
    def bytes(self) -> int:
        return self.pixels * self.pixel_bytes

    @property
    def whole_bytes(self) -> int:
        """As it would be without packing."""
        return self.pixels * self.channels

    @property
    def pixels(self) -> int:
        return self.height * self.width


@dataclass(eq=False)
class Real:
    """A tensor of float32 in the arena, channels last as codes are."""

    name: str
    height: int
    width: int
    channels: int

    @property
    def bytes(self) -> int:
        return 4 * self.height * self.width * self.channels

    @property
    def whole_bytes(self) -> int:
        return self.bytes


Tensor = Codes | Real


@dataclass(eq=False)
class Step:
    """One operation. ``path``: the module that it comes from; ``out`` is None where it writes the model's output."""

    path: str
    sources: list[Any]
    out: Any

    @property
    def convolution(self) -> Conv | None:
        """The convolution or linear layer that the step is, or begins with."""
        return None


@dataclass(eq=False)
class Quantize(Step):
    """The model's float input [C, H, W] to codes."""


@dataclass(eq=False)
class Dequantize(Step):
    """Codes to the model's float output, in the order [C, H, W]."""


@dataclass(eq=False)
class Window:
    """Where a kernel looks: sizes, strides, dilations (vertical, horizontal) and pads (top, left)."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)


@dataclass(eq=False)
class Fused:
    """An addition after a convolution: its output codes, on ``between``, plus ``other`` are the codes that are kept."""

    path: str
    between: Codes
    other: Codes
    first: bool  # whether the convolution is the addition's first operand


@dataclass(eq=False)
class Conv(Step):
    """A convolution or linear layer. weight: int [out, kh, kw, in per group] without headroom; bias: int64 [out].

    The integer kernel of onnxruntime gets ``weight << headroom``. scale: float32 [out], what its sums are multiplied
    by: ``s_x s_w / s_y``, or ``s_x s_w`` where the result is real. ``width``, ``height``: of the result.
    """

    weight: NDArray[np.int64]
    bias: NDArray[np.int64]
    scale: NDArray[np.float32]
    bits: int
    headroom: int
    window: Window
    groups: int
    height: int
    width: int
    add: Fused | None = None
    pixels: int = 2  # output pixels that the kernel works on at once
    late: NDArray[np.float32] | None = None  # a bias that is added to the real result

    @property
    def convolution(self) -> Conv | None:
        return self

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[0])

    @property
    def depthwise(self) -> bool:
        """One input channel for each output channel: the kernel that works channel by channel."""
        return self.groups > 1 and self.weight.shape[3] == 1

    @property
    def taps(self) -> int:
        """Products of one output value."""
        return int(self.weight[0].size)

    @property
    def macs(self) -> int:
        return self.taps * self.outputs * self.height * self.width


@dataclass(eq=False)
class Add(Step):
    """Codes plus codes."""


@dataclass(eq=False)
class GlobalPool(Step):
    """The mean over height and width; ``factor``: float32, what sums are multiplied by."""

    factor: np.float32


@dataclass(eq=False)
class MaxPool(Step):
    """The largest code of each window."""

    window: Window


@dataclass(eq=False)
class Table(Step):
    """A function of one code: ``values[byte]`` is the byte that comes out."""

    values: NDArray[np.uint8]


@dataclass(eq=False)
class Concat(Step):
    """Channels side by side."""


@dataclass(eq=False)
class Move(Step):
    """Bytes in another order: nested loops, the outermost first, as (size, stride in the source)."""

    offset: int
    loops: list[tuple[int, int]]


@dataclass(eq=False)
class Gate(Step):
    """Codes times codes: ``factor``: float32, what products are multiplied by. strides: of a pixel and of a channel,
    for both operands."""

    factor: np.float32
    strides: tuple[tuple[int, int], tuple[int, int]]


@dataclass(eq=False)
class Product:
    """A product of two tensors of codes: [heads, rows, depth] times [heads, depth, columns].

    first, second: where an operand begins, and its strides over heads, rows (or columns) and depth, in bytes. factor:
    float32, what the sums are multiplied by.
    """

    heads: int
    rows: int
    columns: int
    depth: int
    first: tuple[int, int, int, int]
    second: tuple[int, int, int, int]
    factor: np.float32


@dataclass(eq=False)
class Rows(Step):
    """Real values [rows, columns], a row at a time: brought in, changed and put away.

    begin: what makes the rows: a linear layer, a product, or None where ``sources[0]`` holds them, from the element
    ``first`` on, a row every ``stride`` elements. changes: of (name, operands), in order, see `rows`. The result is
    quantized by its scale (where ``rounded`` it is in steps already). mean: the mean of all rows is kept. planes: the
    model's output has its channels first.
    """

    rows: int
    columns: int
    begin: Conv | Product | None = None
    first: int = 0
    stride: int = 0
    changes: list[tuple[str, Any]] = field(default_factory=list)
    rounded: bool = False
    mean: bool = False
    planes: bool = False

    @property
    def convolution(self) -> Conv | None:
        return self.begin if isinstance(self.begin, Conv) else None

    @property
    def exact(self) -> bool:
        return not self.mean and all(name in ("scale", "constant", "add", "relu") for name, _ in self.changes)


@dataclass
class Program:
    """A model. inputs, outputs: the shapes of one sample, as in the ONNX file."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    steps: list[Step] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything in the arena, in the order it is made."""
        return [step.out for step in self.steps if step.out is not None]

    @property
    def convs(self) -> list[Conv]:
        return [step.convolution for step in self.steps if step.convolution is not None]

    @property
    def floats(self) -> list[Rows]:
        """Steps whose arithmetic on real values is our own, not onnxruntime's bit for bit."""
        return [step for step in self.steps if isinstance(step, Rows) and not step.exact]

    @property
    def macs(self) -> int:
        products = [s.begin for s in self.steps if isinstance(s, Rows) and isinstance(s.begin, Product)]
        total = sum(product.heads * product.rows * product.columns * product.depth for product in products)
        return total + sum(conv.macs for conv in self.convs)
