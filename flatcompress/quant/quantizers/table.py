"""The quantizers by name. A row makes the tensor quantizer (or a stock Brevitas injector) of a weight or activation.

``name`` is the one that messages use: the layer's, or the activation quantizer's.
"""

from __future__ import annotations

from typing import Any

import torch
from brevitas.core.scaling import ScalingImplType
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat
from torch import nn

from flatcompress.quant.quantizers.lsq import StepQuantizer
from flatcompress.quant.quantizers.modules import ActivationProxy, WeightProxy, injector
from flatcompress.quant.quantizers.variants import ClipQuantizer, OffsetQuantizer, three_sigma
from flatcompress.registry import Registry

QUANTIZERS = Registry("quantizer")


def lsq(
    target: str, name: str, *, bits: int, signed: bool, layer: nn.Module | None = None, per_channel: bool = True
) -> Any:
    """LSQ for weights and activations."""
    if target == "weight":
        assert layer is not None
        return _weight(name, layer, bits, per_channel)
    return _activation(name, StepQuantizer(bits, signed, per_sample=True))


def lsq_plus(
    target: str, name: str, *, bits: int, signed: bool, layer: nn.Module | None = None, per_channel: bool = True
) -> Any:
    """LSQ+: three-sigma weight start; signed activations get an unsigned grid with a learned offset."""
    if target == "weight":
        assert layer is not None
        return _weight(name, layer, bits, per_channel, three_sigma)
    made = OffsetQuantizer(bits) if signed else StepQuantizer(bits, False, per_sample=True)
    return _activation(name, made)


def pact(
    target: str, name: str, *, bits: int, signed: bool, layer: nn.Module | None = None, per_channel: bool = True
) -> Any:
    """PACT: a learned clipping level for activations; weights as LSQ."""
    if target == "weight":
        return lsq(target, name, bits=bits, signed=signed, layer=layer, per_channel=per_channel)
    return _activation(name, ClipQuantizer(bits, signed))


def brevitas_learned(
    target: str, name: str, *, bits: int, signed: bool, layer: nn.Module | None = None, per_channel: bool = True
) -> Any:
    """Brevitas's own learned scales: absmax start, no gradient scale, narrow weight range."""
    if target == "weight":
        granularity = {} if per_channel else {"scaling_per_output_channel": False}
        return Int8WeightPerChannelFloat.let(
            bit_width=bits, scaling_impl_type=ScalingImplType.PARAMETER_FROM_STATS, **granularity
        )
    stock = Int8ActPerTensorFloat if signed else Uint8ActPerTensorFloat
    return stock.let(bit_width=bits, collect_stats_steps=30)


def brevitas_stats(
    target: str, name: str, *, bits: int, signed: bool, layer: nn.Module | None = None, per_channel: bool = True
) -> Any:
    """Brevitas's default: the weight scale is the largest magnitude of every step, activations as `brevitas`."""
    if target == "weight":
        granularity = {} if per_channel else {"scaling_per_output_channel": False}
        return Int8WeightPerChannelFloat.let(bit_width=bits, **granularity)
    return brevitas_learned(target, name, bits=bits, signed=signed)


def _weight(name: str, layer: nn.Module, bits: int, per_channel: bool, start: Any = None) -> Any:
    weight = layer.weight.detach()  # type: ignore[operator]
    shape = (weight.shape[0], *[1] * (weight.dim() - 1)) if per_channel else ()
    quantizer = StepQuantizer(bits, True, shape).to(weight)
    quantizer.name = name  # before it is set: what is wrong with the weights is said by name
    rows = weight.flatten(1) if per_channel else weight.reshape(1, -1)
    if start is None:
        quantizer.start_from(rows.abs().mean(1))
    else:
        quantizer.set_scale(start(rows, bits))
    return injector(WeightProxy, quantizer)


def _activation(name: str, quantizer: StepQuantizer) -> Any:
    quantizer.name = name
    return injector(ActivationProxy, quantizer)


QUANTIZERS.add("lsq", lsq, "learned step size", "1902.08153")
QUANTIZERS.add("lsq+", lsq_plus, "learned step size and offset", "2004.09576")
QUANTIZERS.add("pact", pact, "learned clipping level for activations", "1805.06085")
QUANTIZERS.add("brevitas", brevitas_learned, "Brevitas's stock quantizers with learned scales")
QUANTIZERS.add("brevitas-stats", brevitas_stats, "Brevitas's stock quantizers, weight scale from absmax")


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's parameters (float32 when it has none)."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
