"""ONNX files of their true size, at full integer speed, that carry their own proof.

`export` lowers a model to integers and writes it; `certify` measures the file against the torch reference,
`verify` repeats that anywhere, `bench` times it. This package knows nothing of how a model was trained, and of
quantizers only the two methods in `flatcompress.graph.lowering_spec`.
"""

from __future__ import annotations

from flatcompress.onnx_export.emit.catalogue import PROFILES
from flatcompress.onnx_export.exporting import Exported, check_c, export
from flatcompress.onnx_export.lower.lowering import lower
from flatcompress.onnx_export.lower.ties import Untied, untie
from flatcompress.onnx_export.proof.certificate import certify
from flatcompress.onnx_export.proof.signature import sign
from flatcompress.onnx_export.proof.verification import Verification, verify
from flatcompress.onnx_export.runtime.latency import bench
from flatcompress.onnx_export.targets import TARGETS
from flatcompress.onnx_export.targets import check as check_target

__all__ = [
    "PROFILES", "TARGETS", "Exported", "Untied", "Verification", "bench", "certify", "check_c", "check_target",
    "export", "lower", "sign", "untie", "verify",
]  # fmt: skip
