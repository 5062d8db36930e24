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
