"""ONNX files as networks that can be pruned, trained, quantized and exported again.

`from_onnx` reads a float file, or a QDQ file, whose quantizers are dropped and whose weights are dequantized. Nodes
with constant weights become torch's layers under the names they have in the file; the rest are torch operators of one
table (`operators`, `windows`). Nothing that a file names is opened or imported.

onnx2torch (newest release August 2024: opset 16 at most for many operators, no LSTM, no QDQ, no sizes computed in the
graph) was looked at and not used.
"""

from __future__ import annotations

from flatcompress.models.from_onnx.reading import from_onnx

__all__ = ["from_onnx"]
