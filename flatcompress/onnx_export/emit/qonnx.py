"""The QONNX dialect: real tensors between `Quant` nodes, which FINN, hls4ml and qonnx read (arXiv 2206.07527).

`Quant(x, s, z, b) = s (clamp(round(x / s + z), lo_b, hi_b) - z)` is written as a custom operator, and the file carries
its definition as an ONNX function besides, so that onnxruntime runs the very same file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper
from torch import fx, nn

from flatcompress.onnx_export.emit.builder import FLOAT, INT32
from flatcompress.onnx_export.emit.layers import MODULES, conv
from flatcompress.onnx_export.emit.profiles import Stored
from flatcompress.onnx_export.emit.writer import ModuleEmitter, Writer, array
from flatcompress.onnx_export.lower import integer
from flatcompress.onnx_export.lower.integer import Grid
from flatcompress.onnx_export.pack.packing import grid_bits

DOMAIN = "qonnx.custom_op.general"


def quant_function(opset: int) -> onnx.FunctionProto:
    """`Quant` in standard operators."""

    def node(kind: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs.split(), [output], **attributes)

    def attribute(name: str, output: str) -> onnx.NodeProto:
        made = node("Constant", "", output)
        made.attribute.append(onnx.AttributeProto(name="value_int", type=onnx.AttributeProto.INT, ref_attr_name=name))
        return made

    body = [
        attribute("signed", "signed_"),
        attribute("narrow", "narrow_"),
        node("Cast", "signed_", "sg", to=FLOAT),
        node("Cast", "narrow_", "nr", to=FLOAT),
        node("Constant", "", "one", value_float=1.0),
        node("Constant", "", "two", value_float=2.0),
        node("Sub", "b sg", "exponent"),
        node("Pow", "two exponent", "half"),
        node("Mul", "sg nr", "raised"),
        node("Mul", "sg half", "below"),
        node("Sub", "raised below", "low"),
        node("Sub", "half one", "top"),
        node("Sub", "nr raised", "lowered"),
        node("Sub", "top lowered", "high"),
        node("Div", "x s", "scaled"),
        node("Add", "scaled z", "moved"),
        node("Round", "moved", "rounded"),
        node("Max", "rounded low", "above"),
        node("Min", "above high", "code"),
        node("Sub", "code z", "centred"),
        node("Mul", "centred s", "y"),
    ]
    imports = [helper.make_opsetid("", opset)]
    return helper.make_function(
        DOMAIN, "Quant", ["x", "s", "z", "b"], ["y"], body, imports, ["signed", "narrow", "rounding_mode"]
    )


def quant(w: Writer, x: str, scale: Any, zero: float, bits: int, signed: bool, name: str = "") -> str:
    """A Quant node; ``scale`` a number or an array that broadcasts."""
    b = w.builder
    b.domains[DOMAIN] = 1
    inputs = [x, b.floats(scale), b.floats(zero), b.floats(bits)]
    return b.op("Quant", inputs, name=name, domain=DOMAIN, signed=int(signed), narrow=0, rounding_mode="ROUND")


def activation(w: Writer, x: str, grid: Grid) -> str:
    """The Quant of a grid; limits tighter than its bits become a Relu or Clip before it."""
    signed = grid.zero_point >= 128 and grid.low >= 128 - (1 << (grid.bits - 1))
    shift = 128 if signed else 0
    half = 1 << (grid.bits - 1)
    low, high = (shift - half, shift + half - 1) if signed else (0, 2 * half - 1)
    if not signed and grid.zero_point == 0:
        x = w.builder.op("Relu", [x])
    if grid.low > low or grid.high < high:
        limits = [w.builder.floats((code - grid.zero_point) * grid.scale) for code in (grid.low, grid.high)]
        x = w.builder.op("Clip", [x, *limits])
    return quant(w, x, grid.scale, grid.zero_point - shift, grid.bits, signed)


def weight(w: Writer, node: fx.Node, module: Any) -> str:
    """Real weights and their Quant, a scale per output channel."""
    values = array(module.weight)
    width = grid_bits(values, module.weight_bits)
    scale = array(module.scale) * np.float32(2 ** getattr(module, "headroom", 0))
    column = scale.reshape([-1] + [1] * (values.ndim - 1))
    return quant(w, w.builder.floats(values * column), column, 0, width, True)


def store(builder: Any, weights: Any) -> dict[str, Stored]:
    """Nothing: QONNX keeps real weights, which `weight` writes."""
    return {n: Stored("", "float32", layer.values.size * 4) for n, layer in weights.items()}


def _quantize(w: Writer, node: fx.Node, module: Any) -> str:
    return activation(w, w.tensor(node.args[0]), module.grid)


def _same(w: Writer, node: fx.Node, module: Any) -> str:
    return w.tensor(node.args[0])


def _layer(w: Writer, node: fx.Node, module: Any) -> str:
    w.note_layer(node, module)
    b, path = w.builder, node.meta["path"]
    x, kernel = w.tensor(node.args[0]), weight(w, node, module)
    bias = _bias(module)
    if module.kind == "conv":
        inputs = [x, kernel] + ([b.floats(bias)] if bias is not None else [])
        result = conv(w, inputs, module.attributes, tuple(module.weight.shape[2:]), path)
    else:
        result = b.op("MatMul", [x, b.op("Transpose", [kernel], perm=[1, 0])], name=path)
        result = result if bias is None else b.op("Add", [result, b.floats(bias)])
    grid = getattr(module, "out_grid", None)
    return result if grid is None else activation(w, result, grid)


def _bias(module: Any) -> Any:
    if module.bias is None or isinstance(module, integer.WeightOnlyLayer):
        return None if module.bias is None else array(module.bias)
    return array(module.bias) * (np.float32(module.in_grid.scale) * array(module.scale))


def _add(w: Writer, node: fx.Node, module: Any) -> str:
    a, b = (w.tensor(n) for n in node.args)
    return activation(w, w.builder.op("Add", [a, b], name=node.meta["path"]), module.out_grid)


def _mul(w: Writer, node: fx.Node, module: Any) -> str:
    a, b = (w.tensor(n) for n in node.args)
    return activation(w, w.builder.op("Mul", [a, b], name=node.meta["path"]), module.out_grid)


def _table(w: Writer, node: fx.Node, module: integer.Table) -> str:
    """Real values have no codes to look up: they are computed, and so is what the codes stand for."""
    b, grid, out = w.builder, module.in_grid, module.out_grid
    steps = b.op("Round", [b.op("Div", [w.tensor(node.args[0]), b.floats(grid.scale)])])
    index = b.cast(b.op("Add", [steps, b.floats(grid.zero_point)]), INT32)
    real = (array(module.codes) - out.zero_point) * np.float32(out.scale)
    return activation(w, b.op("Gather", [b.floats(real), index], name=node.meta["path"]), out)


def _pool(w: Writer, node: fx.Node, module: Any) -> str:
    pooled = w.builder.op("GlobalAveragePool", [w.tensor(node.args[0])], name=node.meta["path"])
    return activation(w, pooled, module.out_grid)


def _matmul(w: Writer, node: fx.Node, module: Any) -> str:
    a, b = (w.tensor(n) for n in node.args)
    product = w.builder.op("MatMul", [a, b], name=node.meta["path"])
    return product if module.out_grid is None else activation(w, product, module.out_grid)


QONNX_MODULES: dict[type[nn.Module], ModuleEmitter] = {
    **MODULES,
    integer.Quantize: _quantize,
    integer.ClampCodes: _quantize,
    integer.Dequantize: _same,
    integer.IntegerLayer: _layer,
    integer.WeightOnlyLayer: _layer,
    integer.IntegerAdd: _add,
    integer.IntegerMul: _mul,
    integer.Table: _table,
    integer.IntegerPool: _pool,
    integer.IntegerMatMul: _matmul,
}
