"""The targets: for each what sets the file's form, the rules its tool publishes, and the package that runs it here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from onnx import TensorProto

from flatcompress.onnx_export.targets import lint, tools
from flatcompress.registry import Registry

NOT_ON_DEVICE = "not run on a device"


@dataclass(frozen=True)
class Target:
    """``profile``: of the file. ``quantize``: keys of the quantize stage that it needs. ``weight_bits``: the widest
    weights that it runs on integers everywhere. ``offsets``: it runs activations whose zero point is no end of their
    range on integers too. ``rules``: of its tool. ``page``: where they are published. ``tool``: the package that loads
    the file here, if any. ``device``: what ran where. ``instead``: why no file is written for it, and what to do.
    """

    name: str
    profile: str = ""
    quantize: dict[str, Any] = field(default_factory=dict)
    rules: tuple[lint.Rule, ...] = ()
    page: str = ""
    tool: tools.Tool | None = None
    device: str = NOT_ON_DEVICE
    instead: str = ""
    weight_bits: int = 8
    offsets: bool = True


def onnxruntime_cpu() -> Target:
    """ONNX operators alone; the certificate is measured by this very runtime."""
    return Target(
        "onnxruntime-cpu", "packed", rules=(lint.operators(), lint.opset(13)),
        page="https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html",
        tool=tools.Tool("onnxruntime", None, tools.onnxruntime), device="run here, on this processor",
    )  # fmt: skip


def onnxruntime_web() -> Target:
    """The same operators: the WebAssembly build has the CPU provider's kernels."""
    return Target(
        "onnxruntime-web", "packed", rules=(lint.operators(), lint.opset(13)),
        page="https://onnxruntime.ai/docs/tutorials/web/",
        device="not run in a browser by the certificate; `flatcompress demo` does that",
    )  # fmt: skip


def openvino() -> Target:
    """QuantizeLinear and DequantizeLinear, which its low-precision transformations read; `emit.layers.add_apart`.

    Its int8 kernels saturate with 8-bit weights on x86 processors without VNNI, and weights with a zero point, which
    would not, it computes in floats: hence 7 bits, as NNCF's ``overflow_fix`` has them.
    """
    return Target(
        "openvino", "openvino", weight_bits=7, offsets=False, rules=(lint.operators(), lint.opset(13)),
        page="https://docs.openvino.ai/2026/documentation/openvino-extensibility/openvino-plugin-library/"
        "advanced-guides/low-precision-transformations.html",
        tool=tools.Tool("openvino", "openvino", tools.openvino), device="run here, on this processor",
    )  # fmt: skip


def tensorrt() -> Target:
    """Explicit quantization: int8 with zero point 0, constant scales, real biases (its parser refuses int32 ones)."""
    return Target(
        "tensorrt", "qdq_symmetric", {"symmetric": True},
        (lint.operators(), lint.opset(13), lint.codes(TensorProto.INT8), lint.symmetric, lint.symmetric_weights,
         lint.per_channel, lint.real_biases, lint.plain),
        "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html",
    )  # fmt: skip


def qnn() -> Target:
    """QDQ with uint8 activations and int8 weights; the batch is fixed when the session is made."""
    return Target(
        "qnn", "qdq", {},
        (lint.operators(), lint.opset(13), lint.codes(TensorProto.UINT8), lint.symmetric_weights, lint.per_channel,
         lint.plain),
        "https://onnxruntime.ai/docs/execution-providers/QNN-ExecutionProvider.html",
        tools.Tool("onnxruntime-qnn", "qnn", tools.qnn, samples=16, steps=None),
    )  # fmt: skip


def stm32n6() -> Target:
    """QDQ, int8 with offset for activations and symmetric int8 per channel for weights ("ss/sa per channel")."""
    return Target(
        "stm32n6", "qdq_int8", {},
        (lint.operators(), lint.opset(13), lint.codes(TensorProto.INT8), lint.symmetric_weights, lint.per_channel,
         lint.plain),
        "https://stedgeai-dc.st.com/assets/embedded-docs/stneuralart_operator_support.html",
    )  # fmt: skip


def litert() -> Target:
    """int8 per channel, written without a converter; XNNPACK rounds a product once, as onnxruntime does."""
    return Target(
        "litert", "litert", rules=(lint.operators(), lint.opset(13)),
        page="https://ai.google.dev/edge/litert/conversion/tensorflow/quantization/quantization_spec",
        tool=tools.Tool("ai-edge-litert", "litert", tools.litert), device="run here, on this processor",
    )  # fmt: skip


def executorch() -> Target:
    """There is no writer for it."""
    return Target(
        "executorch", instead="no ExecuTorch (.pte) file is written. On the same phones target: litert runs the same "
        "XNNPACK kernels, and target: onnxruntime-cpu onnxruntime's own; for microcontrollers take profile: c.",
        page="https://docs.pytorch.org/executorch/stable/backends-xnnpack.html",
    )  # fmt: skip


def hls4ml() -> Target:
    """QONNX: real tensors between Quant nodes, read through the qonnx package's cleaning."""
    return Target(
        "hls4ml", "qonnx", rules=(lint.operators("qonnx.custom_op.general"), lint.opset(13)),
        page="https://fastmachinelearning.org/hls4ml/frontend/qonnx.html",
        tool=tools.Tool("qonnx", "qonnx", tools.qonnx, samples=8), device="qonnx only; hls4ml itself and FPGAs not",
    )  # fmt: skip


TARGETS = Registry("target")
TARGETS.add("onnxruntime-cpu", onnxruntime_cpu, "onnxruntime on x86 and ARM processors; run here")
TARGETS.add("onnxruntime-web", onnxruntime_web, "onnxruntime in a browser; `flatcompress demo` runs it there")
TARGETS.add("openvino", openvino, "OpenVINO on Intel processors; run here where openvino is installed")
TARGETS.add("tensorrt", tensorrt, "NVIDIA TensorRT, int8 with zero point 0; linted, not run")
TARGETS.add("qnn", qnn, "Qualcomm NPUs through onnxruntime's QNN provider; emulated here where it is installed")
TARGETS.add("stm32n6", stm32n6, "ST Edge AI's Neural-ART compiler, int8 QDQ; linted, not run")
TARGETS.add("litert", litert, "LiteRT (TFLite) on phones and boards; run here where ai-edge-litert is installed")
TARGETS.add("executorch", executorch, "ExecuTorch: refused, no such file is written")
TARGETS.add("hls4ml", hls4ml, "hls4ml and FINN by QONNX; executed by qonnx here where it is installed")
