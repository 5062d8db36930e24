"""A perturbation *after* the quantizer (SAQ, arXiv 2111.12273, case 3): L(Q(w) + e), e = rho * dL/dQ / ||dL/dQ||.

Perturbing the latent weights instead (case 1) is mostly rounded away: an e smaller than the distance to the next
rounding edge changes no quantized weight at all. Here every quantized layer gets an *offset*, a leaf tensor of zeros
added to Q(w): its gradient is the gradient at the quantizer's output, and a perturbation engine that moves it moves
the quantized weight off its grid. The offset is never trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatcompress.quant.layers import quantized_layers, scale_names


class QuantizedPoint:
    """Moves the point of perturbation of a quantized model from its latent weights to their quantized values.

    Hand ``offsets`` to the base optimizer as one more parameter group, ``perturbed`` and ``compose`` to the flat
    optimizer's slots of the same names; `release` takes the offsets away again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = quantized_layers(model)
        self.offsets: list[Tensor] = []
        for layer in self.layers.values():
            layer.weight_offset = torch.zeros_like(layer.weight, requires_grad=True)
            self.offsets.append(layer.weight_offset)
        self._latent = {id(layer.weight) for layer in self.layers.values()}
        self._scales = scale_names(model)
        self._ids = {id(t) for t in self.offsets}

    def perturbed(self, name: str, parameter: Tensor) -> bool:
        """Which parameters the engine may move: the offsets and what is not quantized; no latent weight, no scale."""
        return id(parameter) in self._ids or (id(parameter) not in self._latent and name not in self._scales)

    def compose(
        self, params: list[nn.Parameter], probes: list[list[Tensor | None]], combined: list[Tensor | None]
    ) -> None:
        """The engine's compose slot: offsets get no gradient, so that no base optimizer ever updates them."""
        for i, parameter in enumerate(params):
            if id(parameter) in self._ids:
                combined[i] = None

    def release(self) -> None:
        """Take the offsets away; the layers quantize as before."""
        for layer in self.layers.values():
            layer.weight_offset = None
        self.offsets.clear()
        self._ids.clear()
