"""The plain QDQ form that compilers for accelerators read: every operator on real values, between DequantizeLinear and
QuantizeLinear.

What the other profiles leave to onnxruntime is written out here: limits are a Relu or Clip before the quantizer and not
on its codes, a tensor that is only moved is quantized again on its own grid (which changes no code), scales are
constants, and nothing computes on an integer tensor. The reference, and with it the certificate, is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx, nn

from flatcompress.errors import UserError
from flatcompress.onnx_export.emit.layers import MODULES, conv, pool_of
from flatcompress.onnx_export.emit.writer import ModuleEmitter, Writer, array, as_matrix
from flatcompress.onnx_export.lower import integer
from flatcompress.onnx_export.lower.integer import Grid


def quantized(w: Writer, x: str, grid: Grid, where: str) -> str:
    """``x`` [...] real -> its limits, QuantizeLinear and DequantizeLinear; real again, on ``grid``."""
    b, form = w.builder, w.profile.form
    assert form is not None
    kind, shift, zero = form.container(grid, where)
    least, most = np.iinfo(kind).min + shift, np.iinfo(kind).max + shift
    low, high = grid.low > least, grid.high < most
    if low and not high and grid.low == grid.zero_point:
        x = b.op("Relu", [x])
    elif low or high:
        x = b.op("Clip", [x, *(b.floats((code - grid.zero_point) * grid.scale) for code in (grid.low, grid.high))])
    ends = [b.floats(grid.scale), b.constant(kind(zero))]
    codes = b.op("QuantizeLinear", [x, *ends])
    result = b.op("DequantizeLinear", [codes, *ends])
    w.grids[result], w.coded[result] = grid, (codes, shift)
    return result


def moved(w: Writer, node: fx.Node, result: Any) -> Any:
    """What an operator that only moves values made of a quantized tensor, on that tensor's grid."""
    grids = {w.grids.get(w.env[n]) for n in node.all_input_nodes if isinstance(w.env.get(n), str)}
    if not isinstance(result, str) or len(grids) != 1 or None in grids or node.target not in w.profile.form.moves:  # type: ignore[union-attr]
        return result
    return quantized(w, result, grids.pop(), str(node.meta.get("path", "")))  # type: ignore[arg-type]


def _quantize(w: Writer, node: fx.Node, module: Any) -> str:
    return quantized(w, w.tensor(node.args[0]), module.grid, node.meta["path"])


def _same(w: Writer, node: fx.Node, module: Any) -> str:
    return w.tensor(node.args[0])


def _layer(w: Writer, node: fx.Node, module: Any) -> str:
    """Conv, Gemm, or for [B, T, C] a Gemm on [B * T, C]."""
    w.note_layer(node, module)
    b, path, out = w.builder, node.meta["path"], getattr(module, "out_grid", None)
    x = w.tensor(node.args[0])
    tokens = module.kind == "linear" and not as_matrix(node)
    if tokens:
        x = b.op("Reshape", [x, b.ints([-1, module.weight.shape[1]])])
        x = quantized(w, x, module.in_grid, path) if isinstance(module, integer.IntegerLayer) else x
    inputs = [x, _weight(w, node, module), *_bias(w, module)]
    if module.kind == "conv":
        result = conv(w, inputs, module.attributes, tuple(module.weight.shape[2:]), path)
    else:
        result = b.op("Gemm", inputs, name=path, transB=1)
    result = result if out is None else quantized(w, result, out, path)
    if not tokens:
        return result
    result = b.op("Reshape", [result, b.ints([-1, *node.meta["shape"][1:]])])
    return result if out is None else quantized(w, result, out, path)


def _weight(w: Writer, node: fx.Node, module: Any) -> str:
    """int8 weights with a scale per output channel and zero points of 0."""
    b, scale = w.builder, array(module.scale)
    stored = w.stored[node.name].tensor
    if isinstance(module, integer.WeightOnlyLayer) and module.kind == "linear" and not as_matrix(node):
        stored = b.constant(array(module.weight))  # it is stored turned, for a MatMul
    return b.op("DequantizeLinear", [stored, b.floats(scale), b.constant(np.zeros(scale.size, np.int8))], axis=0)


def _bias(w: Writer, module: Any) -> list[str]:
    """The bias as int32 codes of step ``s_x s_w``, or as the real values that they stand for."""
    b = w.builder
    if module.bias is None:
        return []
    if not isinstance(module, integer.IntegerLayer):
        return [b.floats(array(module.bias))]
    step = np.float32(module.in_grid.scale) * array(module.scale)
    if w.profile.form.real_bias:  # type: ignore[union-attr]
        return [b.floats(array(module.bias).astype(np.float32) * step)]
    zero = b.constant(np.zeros(step.size, np.int32))
    return [b.op("DequantizeLinear", [b.constant(array(module.bias)), b.floats(step), zero], axis=0)]


def _two(kind: str) -> ModuleEmitter:
    """An operator on two quantized tensors."""

    def emit(w: Writer, node: fx.Node, module: Any) -> str:
        result = w.builder.op(kind, [w.tensor(n) for n in node.args], name=node.meta["path"])
        return result if module.out_grid is None else quantized(w, result, module.out_grid, node.meta["path"])

    return emit


def _pool(w: Writer, node: fx.Node, module: Any) -> str:
    pooled = pool_of(w, node, w.tensor(node.args[0]), module)
    return quantized(w, pooled, module.out_grid, node.meta["path"])


def _table(w: Writer, node: fx.Node, module: Any) -> str:
    path = node.meta["path"]
    raise UserError(f"{path}: a function that is written as a table of codes has no plain QDQ form (Softplus, Mish).")


QDQ_MODULES: dict[type[nn.Module], Callable[..., str]] = {
    **MODULES,
    integer.Quantize: _quantize,
    integer.ClampCodes: _quantize,
    integer.Dequantize: _same,
    integer.IntegerLayer: _layer,
    integer.WeightOnlyLayer: _layer,
    integer.IntegerAdd: _two("Add"),
    integer.IntegerMul: _two("Mul"),
    integer.IntegerMatMul: _two("MatMul"),
    integer.IntegerPool: _pool,
    integer.Table: _table,
}
