"""What a quantizer tells whoever writes the model out: plain numbers, no quantizer classes.

An activation quantizer is any module with ``activation_spec() -> ActivationSpec``; a quantized layer is any
module with ``weight_spec() -> WeightSpec``. Whoever lowers a model looks for these two methods and nothing else.
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

    values: int8, the shape of the layer's weight. scale: float32, [out] (one per output channel) or [1].
    """

    values: torch.Tensor
    scale: torch.Tensor
    bits: int


def headroom(values: torch.Tensor, bits: int) -> int:
    """The power of two by which weights of ``bits`` bits are multiplied in an integer kernel, their scale divided.

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
