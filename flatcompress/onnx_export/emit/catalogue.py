"""The registry of export profiles, and which emitters each is written with."""

from __future__ import annotations

import numpy as np

from flatcompress.onnx_export.emit.layers import MODULES, add_apart
from flatcompress.onnx_export.emit.operators import FUNCTIONS
from flatcompress.onnx_export.emit.profiles import Form, Profile, store_int4, store_int8, store_packed
from flatcompress.onnx_export.emit.qdq import QDQ_MODULES, moved
from flatcompress.onnx_export.emit.qonnx import QONNX_MODULES, quant_function
from flatcompress.onnx_export.emit.qonnx import store as store_nothing
from flatcompress.onnx_export.emit.translated import translate
from flatcompress.onnx_export.emit.writer import Emitters
from flatcompress.onnx_export.lower.integer import IntegerAdd
from flatcompress.registry import Registry

PROFILES = Registry("export profile")


def emitters(profile: Profile) -> Emitters:
    """Module and function emitters of a profile, and what writes the operators that have none."""
    return (profile.modules or MODULES), FUNCTIONS, translate


def packed() -> Profile:
    """Every weight tensor at its own bits, or as mask or N:M indices and values where that is smaller."""
    return Profile("packed", store_packed, pack_vectors=True, unsigned=True)


def int8() -> Profile:
    """Plain int8 weights for tools that want no unpacking."""
    return Profile("int8", store_int8)


def int4() -> Profile:
    """ONNX INT4 and INT2 tensors with a cast: opset 21, and 25 for INT2."""
    return Profile("int4", store_int4, opset=21, fold_weight_only=False, unsigned=True)


def openvino() -> Profile:
    """The packed file, with additions that OpenVINO does not fuse into convolutions."""
    apart = {**MODULES, IntegerAdd: add_apart}
    return Profile("openvino", store_packed, pack_vectors=True, unsigned=True, modules=apart)


def qdq() -> Profile:
    """Plain QDQ with uint8 activations."""
    return Profile("qdq", store_int8, integer_kernels=False, modules=QDQ_MODULES, moved=moved, form=Form())


def qdq_int8() -> Profile:
    """Plain QDQ with int8 activations."""
    return Profile("qdq_int8", store_int8, integer_kernels=False, modules=QDQ_MODULES, moved=moved, form=Form(np.int8))


def qdq_symmetric() -> Profile:
    """Plain QDQ with int8 activations of zero point 0 and real biases."""
    return Profile(
        "qdq_symmetric",
        store_int8,
        integer_kernels=False,
        modules=QDQ_MODULES,
        moved=moved,
        form=Form(np.int8, symmetric=True, real_bias=True),
    )


def qonnx() -> Profile:
    """Real tensors between QONNX's Quant nodes."""
    return Profile("qonnx", store_nothing, integer_kernels=False, functions=(quant_function,), modules=QONNX_MODULES)


def c() -> Profile:
    """The packed file, and C for microcontrollers beside it."""
    return Profile("c", store_packed, pack_vectors=True, c=True)


def litert() -> Profile:
    """The packed file, and a LiteRT file with int8 weights beside it."""
    return Profile("litert", store_packed, pack_vectors=True, unsigned=True, litert=8)


def litert_int4() -> Profile:
    """The packed file, and a LiteRT file that keeps weights of up to 4 bits as int4 beside it."""
    return Profile("litert_int4", store_packed, pack_vectors=True, unsigned=True, litert=4)


def float32() -> Profile:
    """A float model as it is, BatchNorms folded."""
    return Profile("float32", store_int8, integer=False)


def float16() -> Profile:
    """A float model with half-precision weights and arithmetic; input and output stay float32."""
    return Profile("float16", store_int8, integer=False, floats=np.float16)


PROFILES.add("packed", packed, "weights at their own bits or sparse, unpacked when the file is loaded (default)")
PROFILES.add("int8", int8, "plain int8 weights, for tools that want no unpacking")
PROFILES.add("int4", int4, "ONNX INT4 / INT2 weights, opset 21 / 25")
PROFILES.add("openvino", openvino, "the packed file for OpenVINO, its additions kept apart from convolutions")
PROFILES.add("qdq", qdq, "plain QDQ, uint8 activations: Qualcomm's QNN")
PROFILES.add("qdq_int8", qdq_int8, "plain QDQ, int8 activations: ST Edge AI for STM32N6")
PROFILES.add("qdq_symmetric", qdq_symmetric, "plain QDQ, int8 activations with zero point 0, real biases: TensorRT")
PROFILES.add("qonnx", qonnx, "Quant nodes for FINN, hls4ml and qonnx; runs in onnxruntime too, on floats")
PROFILES.add("c", c, "C99 for microcontrollers beside the packed file, every output bit proved equal")
PROFILES.add("litert", litert, "LiteRT (TFLite) beside the packed file, int8 weights; needs ai-edge-litert")
PROFILES.add("litert_int4", litert_int4, "the same with weights of up to 4 bits as int4: smaller, slower, less exact")
PROFILES.add("float32", float32, "a float model, for comparison")
PROFILES.add("float16", float16, "a float model in half precision, for comparison")
