"""One emitter per kind of module in a lowered graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx, nn

from flatcompress.onnx_export.emit.builder import FLOAT, INT32, UINT8
from flatcompress.onnx_export.emit.norms import NORM_LAYERS
from flatcompress.onnx_export.emit.writer import ModuleEmitter, Writer, array, as_matrix
from flatcompress.onnx_export.lower import integer
from flatcompress.onnx_export.lower.prepare import PADS

aten = torch.ops.aten
# Between DequantizeLinear and QuantizeLinear onnxruntime computes a softmax by a table of exponentials, some codes off.
OWN_ARITHMETIC = {aten.softmax.int, aten._softmax.default}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _quantize(w: Writer, node: fx.Node, module: integer.Quantize) -> str:
    return w.codes_of(w.tensor(node.args[0]), module.grid)


def _dequantize(w: Writer, node: fx.Node, module: integer.Dequantize) -> str:
    if any(user.target in OWN_ARITHMETIC for user in node.users):
        b, grid = w.builder, module.grid
        codes = b.cast(w.tensor(node.args[0]), FLOAT)
        return b.op("Mul", [b.op("Sub", [codes, b.floats(float(grid.zero_point))]), b.floats(grid.scale)])
    axis = _axis(node) if any(_feeds_float_layer(w, user) for user in node.users) else None
    return w.real_of(w.tensor(node.args[0]), module.grid, axis)


def _feeds_float_layer(w: Writer, user: fx.Node) -> bool:
    """A float layer, or a padding before one: onnxruntime merges that into the layer first."""
    if user.op == "call_function" and user.target in PADS:
        return any(_feeds_float_layer(w, after) for after in user.users)
    module = w.gm.get_submodule(str(user.target)) if user.op == "call_module" else None
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *TRANSPOSED))


def _axis(node: Any) -> tuple[int, int] | None:
    """Any axis but the batch that is longer than one.

    onnxruntime quantizes the weights of a float Conv or Gemm that stands between DequantizeLinear and
    QuantizeLinear, per tensor and without a word. It leaves alone what follows a DequantizeLinear with one scale
    per channel, so a layer that is meant to stay float gets its input through one.
    """
    shape = node.meta["shape"]
    return next(((axis, size) for axis, size in enumerate(shape) if axis and size > 1), None)


def _clamp(w: Writer, node: fx.Node, module: integer.ClampCodes) -> str:
    return w.clip_codes(w.tensor(node.args[0]), module.grid)


def _integer_layer(w: Writer, node: fx.Node, module: integer.IntegerLayer) -> str:
    """Conv or Gemm between DequantizeLinear and QuantizeLinear; see `_tokens` for [B, T, C]."""
    w.note_layer(node, module)
    if module.kind == "linear" and not as_matrix(node):
        return _tokens(w, node, module)
    floats = module.kind == "conv" and module.out_grid is None  # which onnxruntime must not quantize again
    x = w.real_of(w.tensor(node.args[0]), module.in_grid, _axis(node.args[0]) if floats else None)
    result = _product(w, node, module, [x, *_integer_inputs(w, node, module)], turned=False)
    return result if module.out_grid is None else w.codes_of(result, module.out_grid)


def _tokens(w: Writer, node: fx.Node, module: integer.IntegerLayer) -> str:
    """A linear layer on [B, T, C].

    With a quantized result as Gemm on [B * T, C], because a MatMul and an Add would keep the bias out of the integer
    kernel. With a real result as MatMul and Add all the same: OpenVINO 2026.4 fuses a Gemm, the Reshape behind it and
    a residual addition to something wrong by more than the values themselves.
    """
    b, codes = w.builder, w.tensor(node.args[0])
    if module.out_grid is None:
        weight, *bias = _integer_inputs(w, node, module, turned=True)
        product = b.op("MatMul", [w.real_of(codes, module.in_grid), weight], name=node.meta["path"])
        return b.op("Add", [product, *bias]) if bias else product
    rows = b.op("Reshape", [codes, b.ints([-1, module.weight.shape[1]])])
    inputs = [w.real_of(rows, module.in_grid), *_integer_inputs(w, node, module)]
    result = w.codes_of(_product(w, node, module, inputs, turned=False), module.out_grid)
    return b.op("Reshape", [result, b.ints([-1, *node.meta["shape"][1:]])])


def _integer_inputs(w: Writer, node: fx.Node, module: integer.IntegerLayer, turned: bool = False) -> list[str]:
    """Real weight and bias out of int8 and int32. ``s_x * s_w`` is multiplied out by the runtime: a node is smaller
    than a vector of scales. A matrix's zero point is written out, or it would not run on integers.
    """
    b, stored, scale = w.builder, w.stored[node.name].tensor, array(module.scale)
    name = w.scale_of(node, module)
    step = b.op("Mul", [b.floats(module.in_grid.scale), name]) if module.bias is not None else ""
    if module.kind == "conv" and module.out_grid is None:
        # No integer kernel gives a real result here, and a DequantizeLinear of the weight would run at every call;
        # Cast and Mul are folded when the file is loaded.
        column = b.floats(scale.reshape([-1] + [1] * (module.weight.dim() - 1)))
        weight = b.op("Mul", [b.cast(stored, FLOAT), column])
        if module.bias is None:
            return [weight]
        return [weight, b.op("Mul", [b.cast(w.bias_of(node, module), FLOAT), step])]
    if turned:
        stored = b.op("Transpose", [stored], perm=[1, 0])
    zero = [] if module.kind == "conv" else [b.constant(np.zeros(scale.size, np.int8))]
    if w.unsigned(module):
        stored, zero = _unsigned(w, stored, scale.size)
    inputs = [b.op("DequantizeLinear", [stored, name, *zero], axis=int(turned))]
    if module.bias is not None:
        inputs.append(b.op("DequantizeLinear", [w.bias_of(node, module), step], axis=0))
    return inputs


def _unsigned(w: Writer, stored: str, channels: int) -> tuple[str, list[str]]:
    """The int8 weights plus 128 as uint8, and their zero points; folded when the file is loaded."""
    b = w.builder
    moved = b.op("Add", [b.cast(stored, INT32), b.constant(np.int32(128))])
    return b.cast(moved, UINT8), [b.constant(np.full(channels, 128, np.uint8))]


def _product(w: Writer, node: fx.Node, module: Any, inputs: list[str], turned: bool) -> str:
    """Conv, Gemm, or MatMul and Add, named by the module path."""
    path = node.meta["path"]
    if module.kind == "conv":
        return conv(w, inputs, module.attributes, tuple(module.weight.shape[2:]), path)
    if not turned:
        return w.builder.op("Gemm", inputs, name=path, transB=1)
    product = w.builder.op("MatMul", inputs[:2], name=path)
    return w.builder.op("Add", [product, inputs[2]]) if len(inputs) > 2 else product


def conv(w: Writer, inputs: list[str], attributes: dict[str, Any], kernel: tuple[int, ...], name: str) -> str:
    """A Conv with torch's attributes; those at their default are left out."""
    rank = len(kernel)
    given = {key: _tuple(attributes[key], rank) for key in ("stride", "dilation")}
    written: dict[str, Any] = {"kernel_shape": kernel}
    if any(s != 1 for s in given["stride"]):
        written["strides"] = given["stride"]
    if any(d != 1 for d in given["dilation"]):
        written["dilations"] = given["dilation"]
    pads = _pads(attributes["padding"], kernel, given["dilation"])
    extra = list(attributes.get("pads", []))
    for index, amount in enumerate(extra):  # torch: begin and end of the last dimension, then of the one before
        pads[rank - 1 - index // 2 + rank * (index % 2)] += amount
    if any(pads):
        written["pads"] = pads
    if attributes["groups"] != 1:
        written["group"] = attributes["groups"]
    return w.builder.op("Conv", inputs, name=name, **written)


def conv_transpose(w: Writer, inputs: list[str], attributes: dict[str, Any], kernel: tuple[int, ...], name: str) -> str:
    """A ConvTranspose with torch's attributes; those at their default are left out."""
    rank = len(kernel)
    written: dict[str, Any] = {"kernel_shape": kernel}
    for key, ours, default in (("stride", "strides", 1), ("dilation", "dilations", 1), ("output_padding",) * 2 + (0,)):
        values = _tuple(attributes[key], rank)
        if any(v != default for v in values):
            written[ours] = values
    if any(pads := list(_tuple(attributes["padding"], rank)) * 2):
        written["pads"] = pads
    if attributes["groups"] != 1:
        written["group"] = attributes["groups"]
    return w.builder.op("ConvTranspose", inputs, name=name, **written)


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    return tuple(value) * (rank // len(value)) if isinstance(value, list | tuple) else (value,) * rank


def _pads(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """Begins, then ends. "same" puts the odd pixel at the end, as torch does."""
    if padding == "valid":
        return [0] * (2 * len(kernel))
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel)]
        begins = [t // 2 for t in total]
        return begins + [t - begin for t, begin in zip(total, begins)]
    return list(_tuple(padding, len(kernel))) * 2


def _weight_only(w: Writer, node: fx.Node, module: integer.WeightOnlyLayer) -> str:
    """Integer weights on real inputs.

    packed and int8 multiply the scale in with Cast and Mul, which the runtime folds into float weights when it loads
    the file: exact, at float speed. int4 writes DequantizeLinear into MatMul, which becomes MatMulNBits.
    """
    w.note_layer(node, module)
    b = w.builder
    turned = module.kind == "linear" and not (as_matrix(node) and w.profile.fold_weight_only)
    stored = w.stored[node.name].tensor
    if turned and as_matrix(node):
        stored = b.op("Transpose", [stored], perm=[1, 0])
    if w.profile.fold_weight_only:
        shape = (-1,) if turned else (-1,) + (1,) * (module.weight.dim() - 1)
        weight = b.op("Mul", [b.cast(stored, FLOAT), b.floats(array(module.scale).reshape(shape))])
    else:
        zero = b.constant(np.zeros(module.scale.numel(), np.int8))
        inputs = [stored, b.floats(array(module.scale)), zero]
        weight = b.op("DequantizeLinear", inputs, axis=1 if turned else 0)
    bias = [w.constant(module.bias)] if module.bias is not None else []
    return _product(w, node, module, [w.tensor(node.args[0]), weight, *bias], turned)


def _add(w: Writer, node: fx.Node, module: integer.IntegerAdd) -> str:
    a, b = (w.tensor(n) for n in node.args)
    total = w.builder.op("Add", [w.real_of(a, module.first), w.real_of(b, module.second)], name=node.meta["path"])
    return w.codes_of(total, module.out_grid)


def add_apart(w: Writer, node: fx.Node, module: integer.IntegerAdd) -> str:
    """`_add` whose operands pass a Clip that limits nothing, for OpenVINO.

    OpenVINO 2026.4's CPU plugin fuses an addition, and the quantizer before it, into the convolution that makes an
    operand, and does not round there: the inner quantizer is lost. A Clip on both operands keeps the addition apart.
    """
    b, parts = w.builder, []
    for operand, grid in zip(node.args, (module.first, module.second)):
        reach = 2.0 * grid.scale * 256
        parts.append(b.op("Clip", [w.real_of(w.tensor(operand), grid), b.floats(-reach), b.floats(reach)]))
    return w.codes_of(b.op("Add", parts, name=node.meta["path"]), module.out_grid)


def _mul(w: Writer, node: fx.Node, module: integer.IntegerMul) -> str:
    a, b = (w.tensor(n) for n in node.args)
    product = w.builder.op("Mul", [w.real_of(a, module.first), w.real_of(b, module.second)], name=node.meta["path"])
    return w.codes_of(product, module.out_grid)


def _table(w: Writer, node: fx.Node, module: integer.Table) -> str:
    index = w.builder.cast(w.tensor(node.args[0]), INT32)
    return w.builder.op(
        "Gather", [w.builder.constant(array(module.codes).astype(np.uint8)), index], name=node.meta["path"]
    )


def _pool(w: Writer, node: fx.Node, module: integer.IntegerPool) -> str:
    x = w.real_of(w.tensor(node.args[0]), module.in_grid)
    return w.codes_of(pool_of(w, node, x, module), module.out_grid)


def pool_of(w: Writer, node: fx.Node, x: str, module: integer.IntegerPool) -> str:
    """The mean of a map of real numbers, with a Clip that limits nothing where onnxruntime has no integer kernel.

    Its QLinearGlobalAveragePool ends with an error where in_scale / (out_scale * pixels) is 256 or more, or below
    2^-32: means that are nearly zero, behind an instance norm for one. The Clip keeps the pool in floats.
    """
    ratio, reach = float(module.in_grid.scale) / float(module.out_grid.scale), 2.0 * module.in_grid.scale * 256
    if not 2.0**-8 <= ratio < 256:  # of any size of map: one pixel to the kernel's limit of 2^24
        x = w.builder.op("Clip", [x, w.builder.floats(-reach), w.builder.floats(reach)])
    return w.builder.op("GlobalAveragePool", [x], name=node.meta["path"])


def _matmul(w: Writer, node: fx.Node, module: integer.IntegerMatMul) -> str:
    a, b = (w.tensor(n) for n in node.args)
    product = w.builder.op("MatMul", [w.real_of(a, module.first), w.real_of(b, module.second)], name=node.meta["path"])
    return product if module.out_grid is None else w.codes_of(product, module.out_grid)


def _float_conv(w: Writer, node: fx.Node, module: Any) -> str:
    w.note_layer(node, module)
    inputs = [w.tensor(node.args[0]), w.constant(module.weight)]
    if module.bias is not None:
        inputs.append(w.constant(module.bias))
    given = {key: getattr(module, key) for key in ("stride", "padding", "dilation", "groups")}
    return conv(w, inputs, given, tuple(module.kernel_size), node.meta["path"])


def _float_transposed(w: Writer, node: fx.Node, module: Any) -> str:
    w.note_layer(node, module)
    inputs = [w.tensor(node.args[0]), w.constant(module.weight)]
    if module.bias is not None:
        inputs.append(w.constant(module.bias))
    given = {key: getattr(module, key) for key in ("stride", "padding", "dilation", "groups", "output_padding")}
    return conv_transpose(w, inputs, given, tuple(module.kernel_size), node.meta["path"])


def _float_linear(w: Writer, node: fx.Node, module: nn.Linear) -> str:
    w.note_layer(node, module)
    b, x = w.builder, w.tensor(node.args[0])
    bias = [w.constant(module.bias)] if module.bias is not None else []
    if as_matrix(node):
        return b.op("Gemm", [x, w.constant(module.weight), *bias], name=node.meta["path"], transB=1)
    product = b.op("MatMul", [x, w.constant(module.weight.T.contiguous())], name=node.meta["path"])
    return b.op("Add", [product, *bias]) if bias else product


def _embedding(w: Writer, node: fx.Node, module: nn.Embedding) -> str:
    return w.builder.op("Gather", [w.constant(module.weight), w.tensor(node.args[0])], name=node.meta["path"])


MODULES: dict[type[nn.Module], ModuleEmitter] = {
    integer.Quantize: _quantize,
    integer.Dequantize: _dequantize,
    integer.ClampCodes: _clamp,
    integer.IntegerLayer: _integer_layer,
    integer.WeightOnlyLayer: _weight_only,
    integer.IntegerAdd: _add,
    integer.IntegerMul: _mul,
    integer.Table: _table,
    integer.IntegerPool: _pool,
    integer.IntegerMatMul: _matmul,
    nn.Conv1d: _float_conv,
    nn.Conv2d: _float_conv,
    nn.Conv3d: _float_conv,
    nn.Linear: _float_linear,
    **NORM_LAYERS,
    **dict.fromkeys(TRANSPOSED, _float_transposed),
    nn.Embedding: _embedding,
}
