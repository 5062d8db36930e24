"""flatcompress: train flat, cut, quantize, ship.

One recipe turns a PyTorch model and its data into a low-bit, sparse ONNX file that still works on data it was
never trained on, and proves it. The packages are usable on their own: `flatcompress.flat` (sharpness-aware
optimizers), `flatcompress.quant` (low-bit QAT), `flatcompress.prune` (channel pruning) and
`flatcompress.onnx_export` (packed ONNX files and their certificates).
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Loaded on first use: importing torch takes over a second, and `flatcompress --help` needs none of it.
_LAZY = {
    "Pipeline": "flatcompress.pipeline",
    "Plan": "flatcompress.plan",
    "apply_plan": "flatcompress.plan",
    "compress": "flatcompress.compressing",
}
_PACKAGES = ("data", "flat", "graph", "models", "onnx_export", "prune", "quant", "report", "stages", "training")

__all__ = ["Pipeline", "Plan", "__version__", "apply_plan", "compress", *_PACKAGES]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"flatcompress.{name}")
    raise AttributeError(f"module 'flatcompress' has no attribute {name!r}")
