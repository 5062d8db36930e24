"""Low-bit quantization-aware training: quantizers on Brevitas layers, placed by the graph.

`quantize` turns a float model into a quantized one in place, `calibrate` sets the activation scales, `explain` says
what was decided. This package knows nothing of flat-minima methods, pruning or recipes; what it offers to others are
compose functions for a two-probe optimizer step and plain numbers (`activation_spec`, `weight_spec`) for a writer.
"""

from __future__ import annotations

from flatcompress.quant.batchnorm import reestimate_batchnorm, reestimated
from flatcompress.quant.bits import Price, allocate, auto_bits
from flatcompress.quant.held import held
from flatcompress.quant.layers import (
    activation_quantizers,
    apply,
    calibrate,
    explain,
    is_quantized,
    quantize,
    quantized_layers,
    scale_names,
    scale_parameters,
    tensor_quantizers,
)
from flatcompress.quant.ptq import PostTraining, diagnose, post_training, within_drop
from flatcompress.quant.qat.cage import Cage
from flatcompress.quant.qat.compose import Alternation, ScaleBloop
from flatcompress.quant.qat.conflict import ScaleConflict
from flatcompress.quant.qat.distill import distillation_loss
from flatcompress.quant.qat.oscillation import OscillationTracker, anneal, dampening_loss
from flatcompress.quant.qat.rounding import set_bias_rounding
from flatcompress.quant.qat.saq import QuantizedPoint
from flatcompress.quant.qat.scale_steps import RelativeSteps, ScaleTurns
from flatcompress.quant.quantizers.table import QUANTIZERS, Quantizer
from flatcompress.quant.sensitivity import flatness_map, hessian_traces, rounded_loss, sensitivities

__all__ = [
    "QUANTIZERS",
    "Alternation",
    "Cage",
    "OscillationTracker",
    "PostTraining",
    "Price",
    "QuantizedPoint",
    "Quantizer",
    "RelativeSteps",
    "ScaleBloop",
    "ScaleConflict",
    "ScaleTurns",
    "activation_quantizers",
    "allocate",
    "anneal",
    "apply",
    "auto_bits",
    "calibrate",
    "dampening_loss",
    "diagnose",
    "distillation_loss",
    "explain",
    "flatness_map",
    "held",
    "hessian_traces",
    "is_quantized",
    "post_training",
    "quantize",
    "quantized_layers",
    "reestimate_batchnorm",
    "reestimated",
    "rounded_loss",
    "scale_names",
    "scale_parameters",
    "sensitivities",
    "set_bias_rounding",
    "tensor_quantizers",
    "within_drop",
]
