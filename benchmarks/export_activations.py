"""What a function of one quantized tensor costs in onnxruntime: floats between quantizers, a fused kernel, a table.

    python -m benchmarks.export_activations [--quick] [--check]

Activation functions of 8-bit networks, each in the forms it can be written in: ``float`` (DequantizeLinear, the
function, QuantizeLinear), ``fused`` (where plain QDQ becomes QLinearSigmoid, QLinearLeakyRelu or QLinearMul; SiLU and
Hardswish then quantize their gate once more) and ``table`` (Cast, Gather from 256 bytes). Nanoseconds a value of CPU
time with one thread, beside the same file without the function, interleaved, on two sizes of mobile networks.

Targets
  1. The form that the exporter writes is the fastest one, or within 2 nanoseconds a value of it (the fused SiLU and
     Hardswish round once more, which is not worth less than that).
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

from benchmarks._common import arguments, finish
from flatcompress.onnx_export.lower import tables
from flatcompress.onnx_export.runtime import latency

aten = torch.ops.aten
SHAPES = ([1, 16, 56, 56], [1, 120, 14, 14])
SLACK = 2.0
GATE = {"hardswish": "HardSigmoid", "silu": "Sigmoid"}
# Of every function: what it is in torch, and its nodes from d to o.
FUNCTIONS: dict[str, tuple[Any, list[tuple[str, str, str, dict[str, Any]]]]] = {
    "hardswish": (
        aten.hardswish.default,
        [("HardSigmoid", "d", "g", {"alpha": 1 / 6, "beta": 0.5}), ("Mul", "d g", "o", {})],
    ),
    "silu": (aten.silu.default, [("Sigmoid", "d", "g", {}), ("Mul", "d g", "o", {})]),
    "sigmoid": (aten.sigmoid.default, [("Sigmoid", "d", "o", {})]),
    "hardsigmoid": (aten.hardsigmoid.default, [("HardSigmoid", "d", "o", {"alpha": 1 / 6, "beta": 0.5})]),
    "leaky_relu": (aten.leaky_relu.default, [("LeakyRelu", "d", "o", {"alpha": 0.1})]),
    "tanh": (aten.tanh.default, [("Tanh", "d", "o", {})]),
    "elu": (aten.elu.default, [("Elu", "d", "o", {})]),
    "gelu": (
        aten.gelu.default,
        [("Div", "d root", "a", {}), ("Erf", "a", "e", {}), ("Add", "e one", "f", {}), ("Mul", "d f", "h", {}),
         ("Mul", "h half", "o", {})],
    ),
    "softplus": (aten.softplus.default, [("Softplus", "d", "o", {})]),
    "mish": (aten.mish.default, [("Softplus", "d", "a", {}), ("Tanh", "a", "b", {}), ("Mul", "d b", "o", {})]),
}  # fmt: skip
CONSTANTS: dict[str, Any] = {
    "s": np.float32(0.05), "z": np.uint8(128), "t": np.float32(0.03), "u": np.uint8(10), "gs": np.float32(1 / 255),
    "gz": np.uint8(0), "root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5),
    "table": np.arange(256, dtype=np.uint8)[::-1].copy(),
}  # fmt: skip


def node(kind: str, inputs: str, output: str, **attributes: Any) -> NodeProto:
    """A node whose inputs are names with spaces between."""
    return helper.make_node(kind, inputs.split(), [output], **attributes)


def model(name: str, form: str, shape: list[int]) -> bytes | None:
    """A file with one function in one form, None where it has no such form; form "nothing" has no function."""
    function = [node(kind, inputs, output, **given) for kind, inputs, output, given in FUNCTIONS[name][1]]
    ends = [node("QuantizeLinear", "o t u", "y")]
    if form == "nothing":
        body, ends = [], [node("Identity", "q", "y")]
    elif form == "table":
        body, ends = [node("Cast", "q", "i", to=TensorProto.INT32), node("Gather", "table i", "y")], []
    elif form == "float" or name in ("sigmoid", "leaky_relu", "hardsigmoid"):
        if form == "fused" and name == "hardsigmoid":
            return None
        body = [node("DequantizeLinear", "q s z", "d"), *function]
    elif name in GATE:
        gate = [node("QuantizeLinear", "g gs gz", "gq"), node("DequantizeLinear", "gq gs gz", "gd")]
        again = node("DequantizeLinear", "q s z", "d2")
        body = [node("DequantizeLinear", "q s z", "d"), function[0], *gate, again, node("Mul", "d2 gd", "o")]
    else:
        return None
    nodes = [node("QuantizeLinear", "x s z", "q"), *body, *ends, node("DequantizeLinear", "y t u", "out")]
    start = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    end = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    held = [numpy_helper.from_array(np.asarray(value), key) for key, value in CONSTANTS.items()]
    graph = helper.make_graph(nodes, "g", [start], [end], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8).SerializeToString()


def measured(name: str, shape: list[int], runs: int) -> dict[str, float]:
    """Nanoseconds a value of every form of a function, by name."""
    files = {form: model(name, form, shape) for form in ("nothing", "float", "fused", "table")}
    found = latency.measure({k: v for k, v in files.items() if v}, runs=runs, clock=time.process_time)
    base, values = found.pop("nothing")["median_ms"], float(np.prod(shape))
    return {form: (row["median_ms"] - base) * 1e6 / values for form, row in found.items()}


def written(name: str) -> str:
    """The form that the exporter writes: a table where the function's cost is above a table's."""
    return "table" if tables.COST.get(FUNCTIONS[name][0], 0.0) > tables.TABLE else "float"


def main() -> int:
    """The table, the file, the exit code."""
    options = arguments(__doc__)
    shapes, runs = (SHAPES[1:], 5) if options.quick else (SHAPES, 15)
    rows, missed = [], []
    for name in FUNCTIONS:
        each = [measured(name, shape, runs) for shape in shapes]
        found = {form: statistics.mean(row[form] for row in each) for form in each[0]}
        chosen = written(name)
        if found[chosen] > min(found.values()) + SLACK:
            missed.append(
                f"{name}: {chosen} takes {found[chosen]:.2f} ns a value, {min(found.values()):.2f} is possible."
            )
        rows.append({"function": name, **{form: round(value, 2) for form, value in found.items()}, "written": chosen})
    return finish("export_activations", rows, missed, options)


if __name__ == "__main__":
    sys.exit(main())
