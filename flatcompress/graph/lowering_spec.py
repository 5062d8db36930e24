"""What a quantizer tells whoever writes the model out: plain numbers, no quantizer classes.

An activation quantizer is any module with ``activation_spec() -> ActivationSpec``; a quantized layer is any
module with ``weight_spec() -> WeightSpec``. Whoever lowers a model looks for these two methods and nothing else.

What stands between quantizers needs no class of its own:

- convolutions in 1, 2 and 3 dimensions, depthwise ones too, linear layers and the projections of attention are layers
  with a ``weight_spec`` (a MultiheadAttention's input projection becomes a linear layer ``in_proj``);
- transposed convolutions are the same with ``axis`` 1 (`rows` gives the layout of a convolution);
- quantizer - pointwise operators - quantizer is a function of one code (`pointwise.function_of_one`): a table;
- ``mul`` of two quantized tensors, broadcast or not, followed by a quantizer is a gate, as ``add`` is a residual;
- what only training does (dropout, stochastic depth) is a module that is an ``nn.Identity``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ActivationSpec:
    """A per-tensor integer grid: ``real = scale * (q - zero_point)`` with q an integer in ``[qmin, qmax]``.

    >>> spec = ActivationSpec(scale=0.5, bits=4, signed=False)
    >>> (spec.qmin, spec.qmax)
    (0, 15)
    """

    scale: float
    bits: int
    signed: bool
    zero_point: int = 0

    @property
    def qmin(self) -> int:
        """Smallest integer of the grid."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest integer of the grid."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1


@dataclass(frozen=True)
class WeightSpec:
    """Integer weights: ``real = values * scale``, no zero point.

    values: int8, the shape of the layer's weight. scale: float32, one per index of dimension ``axis`` or [1]. ``axis``
    is 0, the output channels, and 1 in transposed convolutions, whose weight is [in, out / groups, *kernel].
    """

    values: torch.Tensor
    scale: torch.Tensor
    bits: int
    axis: int = 0


def rows(spec: WeightSpec, groups: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Values as [out, in / groups, *kernel] and scale [out] or [1], also of a transposed convolution with ``groups``.

    The kernel is not mirrored: value [o, i, k] is still what input channel i adds to output o at kernel position k.

    >>> spec = WeightSpec(torch.zeros(4, 3, 5, dtype=torch.int8), torch.ones(3), bits=8, axis=1)
    >>> [tuple(t.shape) for t in rows(spec, groups=2)]
    [(6, 2, 5), (6,)]
    """
    if spec.axis == 0:
        return spec.values, spec.scale
    ins, outs, *kernel = spec.values.shape
    values = spec.values.reshape(groups, ins // groups, outs, *kernel).transpose(1, 2)
    scale = spec.scale if spec.scale.numel() == 1 else spec.scale.repeat(groups)
    return values.reshape(groups * outs, ins // groups, *kernel), scale


def headroom(values: torch.Tensor, bits: int) -> int:
    """The power of two by which weights of ``bits`` bits are multiplied in an integer kernel, their scale divided.

    ``values``: the weights' integers.

    The bias lives on the grid ``s_x * s_w``, which is coarse when both have few bits. int8 has room to spare for
    narrow weights, and a finer ``s_w`` refines the bias's grid for nothing. Up to 64, so that a pair of u8 x s8
    products still fits the int16 of AVX2 kernels without VNNI (2 * 255 * 64 < 2**15).

    >>> headroom(torch.tensor([-8, 7]), 4), headroom(torch.tensor([-20, 3]), 8), headroom(torch.tensor([-128]), 8)
    (3, 1, 0)
    """
    if bits < 8:
        return 7 - bits
    largest = max(1, int(values.to(torch.int32).abs().max()))  # int8 has no +128
    return max(0, (64 // largest).bit_length() - 1)
