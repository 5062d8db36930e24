"""Architectures: a small zoo of our own, and one door to everybody else's.

`build` makes any of them for any number of channels, image size and classes; `MODELS` lists the built-in ones and
`SOURCES` the prefixes for the rest. The package knows nothing of quantizers, pruning or training; its models keep
to what those need: one activation module per use, no functional norms, stable names, no dropout.
"""

from __future__ import annotations

from flatcompress.models.external import SOURCES
from flatcompress.models.factory import MODELS, build
from flatcompress.models.from_onnx import from_onnx
from flatcompress.models.weights import load_weights

__all__ = ["MODELS", "SOURCES", "build", "from_onnx", "load_weights"]
