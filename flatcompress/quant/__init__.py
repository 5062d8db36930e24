"""Low-bit quantization-aware training: quantizers on Brevitas layers, placed by the graph.

`quantize` turns a float model into a quantized one in place, `calibrate` sets the activation scales, `explain` says
what was decided. This room knows nothing of flat-minima methods, pruning or recipes; what it offers to others are
compose functions for a two-probe optimizer step and plain numbers (`activation_spec`, `weight_spec`) for a writer.
"""

from __future__ import annotations

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
from flatcompress.quant.methods import QUANTIZERS

__all__ = [
    "QUANTIZERS",
    "activation_quantizers",
    "apply",
    "calibrate",
    "explain",
    "is_quantized",
    "quantize",
    "quantized_layers",
    "scale_names",
    "scale_parameters",
    "tensor_quantizers",
]
