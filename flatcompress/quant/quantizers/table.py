"""The quantizers by name. A row gives a `Quantizer`: what makes the tensor quantizer of a weight and of an activation.

Either makes our own (see `flatcompress.quant.quantizers.protocol`) inside a Brevitas injector, or is a stock injector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from brevitas.core.scaling import ScalingImplType
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat
from torch import nn

from flatcompress.quant.quantizers.lsq import StepQuantizer
from flatcompress.quant.quantizers.modules import ActivationProxy, WeightProxy, channel_axis, injector
from flatcompress.quant.quantizers.variants import ClipQuantizer, OffsetQuantizer, three_sigma
from flatcompress.registry import Registry


class ForWeight(Protocol):
    """``name``: the layer's, as messages use it. ``per_channel``: one scale per output channel, else one."""

    def __call__(self, name: str, layer: nn.Module, *, bits: int, per_channel: bool) -> Any: ...


class ForActivation(Protocol):
    """``name``: the activation quantizer's, as messages use it."""

    def __call__(self, name: str, *, bits: int, signed: bool) -> Any: ...


@dataclass(frozen=True)
class Quantizer:
    """What makes the Brevitas injector of a layer's weight and that of an activation tensor."""

    weight: ForWeight
    activation: ForActivation


def lsq() -> Quantizer:
    """LSQ for weights and activations."""
    return Quantizer(step_weight, step_activation)


def lsq_plus() -> Quantizer:
    """LSQ+: three-sigma weight start; signed activations get an unsigned grid with a learned offset."""
    return Quantizer(three_sigma_weight, offset_activation)


def pact() -> Quantizer:
    """PACT: a learned clipping level for activations; weights as LSQ."""
    return Quantizer(step_weight, clip_activation)


def brevitas_learned() -> Quantizer:
    """Brevitas's own learned scales: absmax start, no gradient scale, narrow weight range."""
    return Quantizer(stock_learned_weight, stock_activation)


def brevitas_stats() -> Quantizer:
    """Brevitas's default: the weight scale is the largest magnitude of every step, activations as `brevitas`."""
    return Quantizer(stock_stats_weight, stock_activation)


def step_weight(name: str, layer: nn.Module, *, bits: int, per_channel: bool) -> Any:
    """LSQ's step from the mean of |w| per scale."""
    quantizer, rows = _weight(name, layer, bits, per_channel)
    quantizer.start_from(rows.abs().mean(1))
    return injector(WeightProxy, quantizer)


def three_sigma_weight(name: str, layer: nn.Module, *, bits: int, per_channel: bool) -> Any:
    """LSQ+'s step from mean and spread of w per scale."""
    quantizer, rows = _weight(name, layer, bits, per_channel)
    quantizer.set_scale(three_sigma(rows, bits))
    return injector(WeightProxy, quantizer)


def step_activation(name: str, *, bits: int, signed: bool) -> Any:
    """LSQ's step, set by the first data."""
    return _activation(name, StepQuantizer(bits, signed, per_sample=True))


def offset_activation(name: str, *, bits: int, signed: bool) -> Any:
    """A step and an offset; a tensor without negative values needs none."""
    return _activation(name, OffsetQuantizer(bits) if signed else StepQuantizer(bits, False, per_sample=True))


def clip_activation(name: str, *, bits: int, signed: bool) -> Any:
    """A learned clipping level."""
    return _activation(name, ClipQuantizer(bits, signed))


def stock_learned_weight(name: str, layer: nn.Module, *, bits: int, per_channel: bool) -> Any:
    """Brevitas's learned scale."""
    learned = ScalingImplType.PARAMETER_FROM_STATS
    return Int8WeightPerChannelFloat.let(bit_width=bits, scaling_impl_type=learned, **_granularity(per_channel))


def stock_stats_weight(name: str, layer: nn.Module, *, bits: int, per_channel: bool) -> Any:
    """Brevitas's scale from absmax."""
    return Int8WeightPerChannelFloat.let(bit_width=bits, **_granularity(per_channel))


def stock_activation(name: str, *, bits: int, signed: bool) -> Any:
    """Brevitas's scale, learned after 30 steps of statistics."""
    stock = Int8ActPerTensorFloat if signed else Uint8ActPerTensorFloat
    return stock.let(bit_width=bits, collect_stats_steps=30)


def _granularity(per_channel: bool) -> dict[str, Any]:
    return {} if per_channel else {"scaling_per_output_channel": False}


def _weight(name: str, layer: nn.Module, bits: int, per_channel: bool) -> tuple[StepQuantizer, torch.Tensor]:
    """A quantizer without a start, and the weights as one row per scale."""
    weight = layer.get_parameter("weight").detach()
    axis = channel_axis(layer)
    shape = tuple(n if d == axis else 1 for d, n in enumerate(weight.shape)) if per_channel else ()
    quantizer = StepQuantizer(bits, True, shape).to(weight)
    quantizer.name = name  # before it is set: what is wrong with the weights is said by name
    return quantizer, weight.transpose(0, axis).flatten(1) if per_channel else weight.reshape(1, -1)


def _activation(name: str, quantizer: StepQuantizer) -> Any:
    quantizer.name = name
    return injector(ActivationProxy, quantizer)


@dataclass(frozen=True)
class QuantizerFacts:
    """``zero_point``: signed activations get a zero point of their own."""

    zero_point: bool = False


QUANTIZERS = Registry("quantizer", QuantizerFacts)
QUANTIZERS.add("lsq", lsq, "learned step size", "1902.08153")
QUANTIZERS.add("lsq+", lsq_plus, "learned step size and offset", "2004.09576", zero_point=True)
QUANTIZERS.add("pact", pact, "learned clipping level for activations", "1805.06085")
QUANTIZERS.add("brevitas", brevitas_learned, "Brevitas's stock quantizers with learned scales")
QUANTIZERS.add("brevitas-stats", brevitas_stats, "Brevitas's stock quantizers, weight scale from absmax")


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's parameters (float32 when it has none)."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
