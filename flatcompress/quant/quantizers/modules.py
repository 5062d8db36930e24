"""Brevitas layers with our own tensor quantizers inside, made from plain layers without replacing them.

A layer becomes quantized by changing its class: the object, its parameters, its buffers (a ``weight_mask``, say), its
hooks and every reference to it stay. `QuantizedConv2d` and its siblings are Brevitas layers (`isinstance` holds, and
Brevitas's own tools see them), but their forward takes the short way: Brevitas wraps every tensor in a QuantTensor and
asks several proxies on the way, which costs more than the quantizer itself on small layers.
"""

from __future__ import annotations

from typing import Any

import torch
from brevitas.inject import ExtendedInjector
from brevitas.nn import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantIdentity,
    QuantLinear,
)
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from brevitas.proxy.parameter_quant import WeightQuantProxyFromInjector
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjector
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvTransposeNd

from flatcompress.errors import UserError
from flatcompress.graph import ActivationSpec, WeightSpec
from flatcompress.quant.quantizers.function import rectified
from flatcompress.quant.quantizers.lsq import StepQuantizer
from flatcompress.quant.quantizers.protocol import LearnedStep, learns_step


class WeightProxy(WeightQuantProxyFromInjector):
    """Brevitas's proxy, except that the tensor quantizer is made once.

    Brevitas makes it anew when a weight is assigned or a state dict is loaded, which would silently forget learned
    scales and leave the optimizer with parameters that are no longer used.
    """

    def init_tensor_quant(self, preserve_state_dict: bool = False) -> None:
        if self.tensor_quant is None:
            super().init_tensor_quant(preserve_state_dict)


class ActivationProxy(ActQuantProxyFromInjector):
    """As `WeightProxy`, for activations."""

    def init_tensor_quant(self) -> None:
        if getattr(self, "fused_activation_quant_proxy", None) is None:
            super().init_tensor_quant()


def injector(proxy: type[nn.Module], quantizer: LearnedStep) -> type[ExtendedInjector]:
    """A Brevitas injector that hands out ``quantizer``."""
    rows = {"proxy_class": proxy, "signed": quantizer.signed, "narrow_range": False, "tensor_quant": quantizer}
    return type("Learned", (ExtendedInjector,), rows)


class QuantizedLayer(nn.Module):
    """What the layer kinds share: the weight on its grid, and its grid as plain numbers."""

    axis = 0  # the dimension of the weight that has a scale each
    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_quant: Any
    weight_offset: torch.Tensor | None  # a point after the quantizer (see saq.py), None outside of it

    def quantized_weight(self) -> torch.Tensor:
        """Q(w), the shape of ``weight``; with the offset of a perturbed point when there is one."""
        quantizer = self.weight_quant.tensor_quant
        if learns_step(quantizer):
            weight = quantizer.quantize(self.weight)
        else:
            weight = self.weight_quant(self.weight).value
        return weight if self.weight_offset is None else weight + self.weight_offset

    @torch.no_grad()
    def weight_spec(self) -> WeightSpec:
        """Integers (int8, the shape of ``weight``), scale (along ``axis``, or [1]) and bits: what the forward uses."""
        quantizer = self.weight_quant.tensor_quant
        if learns_step(quantizer):
            values, scale, bits = quantizer.integers(self.weight), quantizer.step(), quantizer.bits
        else:
            found = self.weight_quant(self.weight)
            values, scale, bits = (found.value / found.scale).round(), found.scale.detach(), int(found.bit_width)
        return WeightSpec(values.to(torch.int8), scale.flatten().float().clone(), bits, self.axis)


class QuantizedConv1d(QuantizedLayer, QuantConv1d):
    """nn.Conv1d with quantized weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self._conv_forward(x, self.quantized_weight(), self.bias)  # type: ignore[operator]


class QuantizedConv2d(QuantizedLayer, QuantConv2d):
    """nn.Conv2d with quantized weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self._conv_forward(x, self.quantized_weight(), self.bias)  # type: ignore[operator]


class QuantizedConv3d(QuantizedLayer, QuantConv3d):
    """nn.Conv3d with quantized weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self._conv_forward(x, self.quantized_weight(), self.bias)  # type: ignore[operator]


class _QuantizedTransposed(QuantizedLayer):
    """A transposed convolution with quantized weights; groups share the scales of their output channels."""

    axis = 1
    operator: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, own = self.quantized_weight(), vars(self)
        given = [own[k] for k in ("stride", "padding", "output_padding", "groups", "dilation")]
        return type(self).operator(x, weight, self.bias, *given)


class QuantizedConvTranspose1d(_QuantizedTransposed, QuantConvTranspose1d):
    """nn.ConvTranspose1d with quantized weights."""

    operator = staticmethod(F.conv_transpose1d)


class QuantizedConvTranspose2d(_QuantizedTransposed, QuantConvTranspose2d):
    """nn.ConvTranspose2d with quantized weights."""

    operator = staticmethod(F.conv_transpose2d)


class QuantizedConvTranspose3d(_QuantizedTransposed, QuantConvTranspose3d):
    """nn.ConvTranspose3d with quantized weights."""

    operator = staticmethod(F.conv_transpose3d)


class QuantizedLinear(QuantizedLayer, QuantLinear):
    """nn.Linear with quantized weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return F.linear(x, self.quantized_weight(), self.bias)


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
    nn.Linear: QuantizedLinear,
}


def channel_axis(layer: nn.Module) -> int:
    """The dimension of a layer's weight that counts its output channels."""
    return 1 if isinstance(layer, _ConvTransposeNd) else 0


def quantize_layer(layer: nn.Module, weight_quant: Any) -> None:
    """Turn ``layer`` (a stock conv or linear layer) into its Brevitas counterpart, in place."""
    base = next(kind for kind in _KINDS if isinstance(layer, kind))
    made = _KINDS[base]
    if type(layer) is not base:  # a subclass that keeps the stock forward: keep what else it defines
        made = type(type(layer).__name__, (made, type(layer)), {})
    layer.__class__ = made
    QuantWeightBiasInputOutputLayer.__init__(
        layer,  # type: ignore[arg-type]
        weight_quant=weight_quant,
        bias_quant=None,
        input_quant=None,
        output_quant=None,
        return_quant_tensor=False,
    )
    layer.is_same_padded_strided = False  # type: ignore[assignment]
    layer.weight_offset = None  # type: ignore[assignment]


class ActivationQuantizer(QuantIdentity):
    """One activation tensor's quantizer: Brevitas's QuantIdentity, short-cut to our tensor quantizer."""

    def __init__(self, act_quant: Any, bits: int, signed: bool) -> None:
        super().__init__(act_quant=act_quant, return_quant_tensor=False)
        self.bits, self.signed = bits, signed

    @property
    def tensor_quant(self) -> nn.Module:
        """The module that does the quantizing."""
        return self.act_quant.fused_activation_quant_proxy.tensor_quant

    def forward(self, x: torch.Tensor, most: float | None = None) -> torch.Tensor:  # type: ignore[override]
        """Q(x), or Q(min(max(x, 0), most)): with the rectifier before it (see `flatcompress.quant.rectifiers`)."""
        quantizer = self.tensor_quant
        if type(quantizer) is StepQuantizer:
            return quantizer.quantize(x, most)
        x = rectified(x, most)
        if learns_step(quantizer):
            return quantizer.quantize(x)
        return super().forward(x)

    def activation_spec(self) -> ActivationSpec:
        """The grid as plain numbers. UserError while no data has set the scale."""
        quantizer = self.tensor_quant
        if learns_step(quantizer):
            return quantizer.activation_spec()
        scale, zero_point = self.act_quant.scale(), self.act_quant.zero_point()
        if scale is None:
            raise UserError("this Brevitas quantizer has no scale yet: run training steps first.")
        offset = int(zero_point) if zero_point is not None else 0
        return ActivationSpec(float(scale), int(self.act_quant.bit_width()), self.signed, offset)
