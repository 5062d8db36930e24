"""The layers of a lowered model: what an integer runtime computes, written in torch.

Quantized tensors are carried as float tensors of *codes* in 0..255, as they lie in a uint8 tensor of the file: a
signed b-bit grid is stored with zero point 128, because onnxruntime fuses an addition only when all its tensors
have one type, and because its u8 x s8 kernels are the fast ones. Sums of products are exact (float32 below 2**24,
float64 above), and one multiplication by ``s_x * s_w / s_y``, rounded half to even, brings a sum to the next grid,
in the order in which onnxruntime's kernels do it (arXiv 1712.05877, eq. 3 to 5).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatcompress.errors import UserError
from flatcompress.graph.lowering_spec import ActivationSpec

EXACT = 1 << 24  # float32 holds every integer up to here


@dataclass(frozen=True)
class Grid:
    """A uint8 grid: ``real = scale * (code - zero_point)``, codes limited to ``low..high``."""

    scale: float
    zero_point: int
    low: int
    high: int
    bits: int

    @classmethod
    def of(cls, spec: ActivationSpec, where: str) -> Grid:
        """The stored grid of an activation quantizer. UserError when uint8 cannot hold it."""
        shift = 128 if spec.signed else 0
        zero, scale = spec.zero_point + shift, float(torch.tensor(spec.scale, dtype=torch.float32))
        if not 1 <= spec.bits <= 8:
            raise UserError(f"{where}: activations of {spec.bits} bits; an exported file holds 1 to 8.")
        if not 0 <= zero <= 255:
            raise UserError(f"{where}: zero point {spec.zero_point} lies outside the 8-bit range.")
        if not 0 < scale < float("inf"):
            raise UserError(f"{where}: its scale is {spec.scale!r}; calibrate or train the quantizer first.")
        return cls(scale, zero, spec.qmin + shift, spec.qmax + shift, spec.bits)

    def clamped(self, low: float, high: float) -> Grid:
        """The grid after a clamp of the real value: rounding is monotone, so clamping codes is the same thing."""
        return replace(self, low=max(self.low, self._code(low)), high=min(self.high, self._code(high)))

    def _code(self, real: float) -> int:
        if real in (float("inf"), float("-inf")):
            return 255 if real > 0 else 0
        code = torch.round(torch.tensor(real, dtype=torch.float32) / torch.tensor(self.scale, dtype=torch.float32))
        return min(255, max(0, int(code) + self.zero_point))

    def clamp(self, codes: Tensor) -> Tensor:
        """Codes limited to the grid."""
        return codes.clamp(self.low, self.high)


def scale32(value: float) -> Tensor:
    """A float32 scalar tensor: products of scales must round as the runtime's do."""
    return torch.tensor(value, dtype=torch.float32)


class Quantize(nn.Module):
    """Real values -> codes, as QuantizeLinear followed by Clip."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        return self.grid.clamp(torch.round(x / scale32(self.grid.scale)) + self.grid.zero_point)


class Dequantize(nn.Module):
    """Codes -> real values, as DequantizeLinear."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, codes: Tensor) -> Tensor:
        return (codes - self.grid.zero_point) * scale32(self.grid.scale)


class ClampCodes(nn.Module):
    """ReLU and its like on codes."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, codes: Tensor) -> Tensor:
        return self.grid.clamp(codes)


class Rounded(nn.Module):
    """A layer on codes: a `value` that is computed, then rounded to codes of ``out_grid`` (real without one)."""

    out_grid: Grid | None

    def value(self, *codes: Tensor) -> Tensor:
        """In steps of ``out_grid``, without its zero point; the real result where there is none."""
        raise NotImplementedError

    def codes(self, value: Tensor) -> Tensor:
        """``value`` rounded half to even, on the grid."""
        assert self.out_grid is not None
        grid, rounded = self.out_grid, torch.round(value)
        moved = (
            rounded.add_(grid.zero_point) if grid.zero_point else rounded
        )  # in place: each pass costs memory traffic
        return moved.clamp_(grid.low, grid.high)

    def terms(self, *codes: Tensor) -> int:
        """How many products or codes are added for one result."""
        raise NotImplementedError

    def forward(self, *codes: Tensor) -> Tensor:
        value = self.value(*codes)
        return value if self.out_grid is None else self.codes(value)


class IntegerLayer(Rounded):
    """A convolution or linear layer on codes: int8 weights, int32 bias, and one rescaling at the end.

    weight: int8, [out, ...], multiplied by ``2**headroom``; scale: float32 [out] of the multiplied weights; bias:
    int32 [out] at scale ``s_x * scale`` or None. Without ``out_grid`` the result is real: ``sum * (s_x * scale)``.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        in_grid: Grid,
        out_grid: Grid | None,
        weight_bits: int,
        headroom: int = 0,
        attributes: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.in_grid, self.out_grid = in_grid, out_grid
        self.weight_bits, self.headroom = weight_bits, headroom
        self.attributes = attributes or {}
        self.register_buffer("weight", weight.to(torch.int8))
        self.register_buffer("scale", scale.to(torch.float32))
        self.register_buffer("bias", bias)
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor | None

    @property
    def kind(self) -> str:
        """ "linear" or "conv"."""
        return "linear" if self.weight.dim() == 2 else "conv"

    def value(self, *codes: Tensor) -> Tensor:
        (x,) = codes
        step = scale32(self.in_grid.scale) * self._by_channel(self.scale)
        if self.bias is not None and self.out_grid is None and self.kind == "linear" and x.dim() > 2:
            # The runtime has no kernel that adds the bias to the integers here: it comes after.
            return rescale(self._sums(x, None), step, None) + self.bias.to(torch.float32) * step
        return rescale(self._sums(x, self.bias), step, self.out_grid)

    def terms(self, *codes: Tensor) -> int:
        return self.weight[0].numel()

    @property
    def can_saturate(self) -> bool:
        """Whether a u8 x s8 kernel without VNNI (pmaddubsw) may clip: it adds two products in 16 bits.

        Decided for the worst codes of the input's grid. A depthwise kernel multiplies in 16 bits and never clips.
        """
        if self.weight.dim() > 2 and self.weight.shape[1] == 1 and self.attributes.get("groups", 1) > 1:
            return False
        rows = self.weight.flatten(1).to(torch.int32) * 2**self.headroom
        count = min(2, rows.shape[1])
        most = rows.clamp(min=0).topk(count, 1).values.sum(1).max()
        least = rows.clamp(max=0).topk(count, 1, largest=False).values.sum(1).min()
        return bool(most * self.in_grid.high > 32767) or bool(least * self.in_grid.high < -32768)

    def _sums(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The integer sums of products, exact: in float32 as far as they fit, for its convolutions take half the time.

        Products fit more often before they are multiplied by ``2**headroom``, which shifts them and rounds nothing.
        """
        grid, factor = self.in_grid, 2**self.headroom
        largest = max(grid.high - grid.zero_point, grid.zero_point - grid.low, 1)
        products = float(self.weight.abs().flatten(1).to(torch.float64).sum(1).max()) * largest
        added = 0.0 if bias is None else float(bias.abs().max())
        if products * factor + added < EXACT:
            whole = None if bias is None else bias.to(torch.float32)
            return self._products(x, self.weight.to(torch.float32).mul_(factor), whole)
        kind = torch.float32 if products < EXACT else torch.float64
        total = self._products(x, self.weight.to(kind), None).to(torch.float64).mul_(factor)
        return total if bias is None else total.add_(self._by_channel(bias.to(torch.float64)))

    def _by_channel(self, values: Tensor) -> Tensor:
        """[channels] so that it meets the results' channels: of images [channels, 1, ...]."""
        return values.reshape([-1] + [1] * (self.weight.dim() - 2))

    def _products(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.to(weight.dtype)
        x = x - self.in_grid.zero_point if self.in_grid.zero_point else x
        return F.linear(x, weight, bias) if self.kind == "linear" else _convolve(x, weight, bias, self.attributes)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, attributes: dict[str, Any]) -> Tensor:
    """A convolution after its extra "pads" (torch's order), which may differ at the two ends."""
    given = {key: value for key, value in attributes.items() if key != "pads"}
    if "pads" in attributes:
        x = F.pad(x, attributes["pads"])
    return {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()](x, weight, bias, **given)


def rescale(total: Tensor, scale: Tensor, out_grid: Grid | None) -> Tensor:
    """Exact integer sums at ``scale`` in steps of ``out_grid``, or as real values where there is none.

    ``total`` is overwritten.
    """
    return total.to(torch.float32).mul_(scale if out_grid is None else scale / scale32(out_grid.scale))


class IntegerAdd(Rounded):
    """Codes + codes -> codes: ``fma(a, s_a/s_c, fma(b, s_b/s_c, z_c - (s_a/s_c z_a + s_b/s_c z_b)))``.

    The two fused multiply-adds are onnxruntime's; float64 holds each product exactly, so rounding the sum to
    float32 once is the fused operation.
    """

    def __init__(self, first: Grid, second: Grid, out_grid: Grid) -> None:
        super().__init__()
        self.first, self.second, self.out_grid = first, second, out_grid
        self.out_grid: Grid

    def value(self, *codes: Tensor) -> Tensor:
        (a, b), out = codes, self.out_grid
        ratio_a = scale32(self.first.scale) / scale32(out.scale)
        ratio_b = scale32(self.second.scale) / scale32(out.scale)
        fixed = out.zero_point - (ratio_a * self.first.zero_point + ratio_b * self.second.zero_point)
        partial = (b.double() * ratio_b.double() + fixed.double()).float()
        return (a.double() * ratio_a.double() + partial.double()).float()

    def codes(self, value: Tensor) -> Tensor:
        return self.out_grid.clamp(torch.round(value))  # its zero point is in the sum already

    def terms(self, *codes: Tensor) -> int:
        return 2


class IntegerMul(Rounded):
    """Codes * codes -> codes, as a gate is applied: ``round((a - z_a)(b - z_b) (s_a s_b / s_c)) + z_c``."""

    def __init__(self, first: Grid, second: Grid, out_grid: Grid) -> None:
        super().__init__()
        self.first, self.second, self.out_grid = first, second, out_grid
        self.out_grid: Grid

    def value(self, *codes: Tensor) -> Tensor:
        a, b = codes
        product = (a - self.first.zero_point) * (b - self.second.zero_point)
        return rescale(product, scale32(self.first.scale) * scale32(self.second.scale), self.out_grid)

    def terms(self, *codes: Tensor) -> int:
        return 1


class Table(nn.Module):
    """Codes -> codes by a table [256]: any function of one quantized tensor."""

    def __init__(self, codes: Tensor, in_grid: Grid, out_grid: Grid) -> None:
        super().__init__()
        self.in_grid, self.out_grid = in_grid, out_grid
        self.register_buffer("codes", codes.to(torch.float32))
        self.codes: Tensor

    def forward(self, codes: Tensor) -> Tensor:
        return self.codes[codes.long()]


class IntegerPool(Rounded):
    """Global average pooling of codes over height and width: the sum times ``s_x / (s_y * pixels)``."""

    def __init__(self, in_grid: Grid, out_grid: Grid) -> None:
        super().__init__()
        self.in_grid, self.out_grid = in_grid, out_grid
        self.out_grid: Grid

    def value(self, *codes: Tensor) -> Tensor:
        (x,), pixels = codes, self.terms(*codes)
        total = (x - self.in_grid.zero_point).double().sum((-2, -1), keepdim=True).float()
        factor = scale32(self.in_grid.scale) / (scale32(self.out_grid.scale) * pixels)
        return total * factor

    def terms(self, *codes: Tensor) -> int:
        return codes[0].shape[-1] * codes[0].shape[-2]


class IntegerMatMul(Rounded):
    """A product of two activations, both codes; real without ``out_grid``."""

    def __init__(self, first: Grid, second: Grid, out_grid: Grid | None) -> None:
        super().__init__()
        self.first, self.second, self.out_grid = first, second, out_grid

    def value(self, *codes: Tensor) -> Tensor:
        a, b = codes
        total = torch.matmul((a - self.first.zero_point).double(), (b - self.second.zero_point).double())
        return rescale(total, scale32(self.first.scale) * scale32(self.second.scale), self.out_grid)

    def terms(self, *codes: Tensor) -> int:
        return codes[0].shape[-1]


class WeightOnlyLayer(nn.Module):
    """A convolution or linear layer with integer weights on real inputs; bias float32 or None."""

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        weight_bits: int,
        attributes: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.weight_bits, self.attributes = weight_bits, attributes or {}
        self.register_buffer("weight", weight.to(torch.int8))
        self.register_buffer("scale", scale.to(torch.float32))
        self.register_buffer("bias", bias)
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor | None

    @property
    def kind(self) -> str:
        """ "linear" or "conv"."""
        return "linear" if self.weight.dim() == 2 else "conv"

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() * self.scale.reshape([-1] + [1] * (self.weight.dim() - 1))
        if self.kind == "linear":
            return F.linear(x, weight, self.bias)
        return _convolve(x, weight, self.bias, self.attributes)
