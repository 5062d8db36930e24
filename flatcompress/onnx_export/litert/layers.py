"""Writers of the modules of a lowered graph: convolutions, linear layers, additions, pools, and what stays real."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx, nn

from flatcompress.onnx_export.emit.writer import array
from flatcompress.onnx_export.litert.values import HIGH, LOW, Value, stored_axes
from flatcompress.onnx_export.litert.writer import Emit, Writer, refuse
from flatcompress.onnx_export.lower import integer

SAME, VALID = 0, 1
WIDE = 32767
# of a code: how far rounding a bias to the step of 4-bit weights may move a result for these to be stored as such
COARSE = 1 / 32


def _quantize(w: Writer, node: fx.Node, module: integer.Quantize) -> Value:
    return w.codes(w.value(node.args[0], node), module.grid, node.name)


def _dequantize(w: Writer, node: fx.Node, module: integer.Dequantize) -> Value:
    return w.real(w.value(node.args[0], node))


def _clamp(w: Writer, node: fx.Node, module: integer.ClampCodes) -> Value:
    return w.codes(w.value(node.args[0], node), module.grid, node.name)


# --- layers with weights ------------------------------------------------------------------------------------------


def _layer(w: Writer, node: fx.Node, module: integer.IntegerLayer) -> Value:
    if module.kind == "conv":
        return _convolution(w, node, module, module.attributes)
    return _linear(w, node, module)


def _linear(w: Writer, node: fx.Node, module: Any) -> Value:
    """FULLY_CONNECTED over the last axis."""
    x, grid = w.first(w.value(node.args[0], node)), getattr(module, "out_grid", None)
    integers = isinstance(module, integer.IntegerLayer)
    if integers and grid is None and all(user.op == "output" for user in node.users):
        return _wide(w, node, module, x)
    out = w.make(node, grid=grid)
    if grid is None:
        weights = _real_weights(w, node, module, array(module.weight), 0)
        _connected(w, [w.real(x).tensor, *weights], out, 0, 1)
        return out
    weights, version = _weights(w, node, module, array(module.weight), 0, {8: 4, 4: 10})
    return w.rounded(out, lambda to, relu: _connected(w, [x.tensor, *weights], to, relu, version))


def _connected(w: Writer, inputs: list[int], out: Value, relu: int, version: int) -> None:
    keep = len(out.shape) > 2
    w.flat.op("FULLY_CONNECTED", inputs, [out.tensor], max(version, 5 if keep else 1), "FullyConnectedOptions",
              fusedActivationFunction=relu, keepNumDims=keep)  # fmt: skip


def _wide(w: Writer, node: fx.Node, module: integer.IntegerLayer, x: Value) -> Value:
    """The model's last linear layer, whose result is real: on integers, with activations and result of 16 bits.

    The step of the result is the least with which no input can leave int16: the reach is proved from the weights.
    """
    wide = w.flat.tensor(x.stored, "int16", f"{node.name}_input", module.in_grid.scale, 0, x.open_axes)
    w.flat.op("QUANTIZE", [x.tensor], [wide], 2)
    rows = array(module.weight).astype(np.float64) * 2.0**module.headroom
    grid, steps = module.in_grid, module.in_grid.scale * array(module.scale).astype(np.float64)
    ends = np.stack([rows * (grid.low - grid.zero_point), rows * (grid.high - grid.zero_point)])
    bias = np.zeros(len(rows)) if module.bias is None else array(module.bias).astype(np.float64)
    reach = np.maximum(np.abs(ends.max(0).sum(1) + bias), np.abs(ends.min(0).sum(1) + bias)) * steps
    out = w.make(node)
    between = w.flat.tensor(out.stored, "int16", f"{node.name}_int16", max(float(reach.max()), 1e-30) / WIDE, 0,
                            out.open_axes)  # fmt: skip
    weights, _ = _weights(w, node, module, array(module.weight), 0, {8: 7}, np.int64)
    w.flat.op("FULLY_CONNECTED", [wide, *weights], [between], 7, "FullyConnectedOptions",
              keepNumDims=len(out.shape) > 2)  # fmt: skip
    w.flat.op("DEQUANTIZE", [between], [out.tensor], 3)
    return out


def _weights(
    w: Writer,
    node: fx.Node,
    module: integer.IntegerLayer,
    values: NDArray[Any],
    axis: int,
    versions: dict[int, int],
    wide: type = np.int32,
) -> tuple[list[int], int]:
    """[weight, bias] in the file, and the operator's version. values: the weights in the file's order, ``axis`` of the
    output channels. 4-bit weights keep their bits where the coarser step of the bias does not tell.
    """
    scale, step = array(module.scale), np.float32(module.in_grid.scale) * array(module.scale)
    bias = np.zeros(len(scale), np.int64) if module.bias is None else array(module.bias).astype(np.int64)
    narrow = w.narrow and 4 in versions and _nibbles(module, bias)
    if narrow:
        scale, step = scale * np.float32(2**module.headroom), step * np.float32(2**module.headroom)
        bias = np.rint(bias / 2.0**module.headroom).astype(np.int64)
    else:
        values = (values.astype(np.int16) << module.headroom).astype(np.int8)
    weight = w.flat.constant(values, f"{node.name}_weight", scale, axis=axis, nibbles=narrow)
    _note(w, node, module, "int4" if narrow else "int8")
    return [weight, w.flat.constant(bias.astype(wide), f"{node.name}_bias", step)], versions[4 if narrow else 8]


def _nibbles(module: integer.IntegerLayer, bias: NDArray[np.int64]) -> bool:
    values = module.weight
    if module.weight_bits > 4 or int(values.min()) < -8 or int(values.max()) > 7 or module.out_grid is None:
        return False
    unit = 2.0**module.headroom
    lost = np.abs(bias - np.rint(bias / unit) * unit)
    return bool((lost * module.in_grid.scale * array(module.scale) / module.out_grid.scale).max() <= COARSE)


def _real_weights(w: Writer, node: fx.Node, module: Any, values: NDArray[Any], axis: int) -> list[int]:
    """Real [weight, bias]: int8 ones through DEQUANTIZE, which LiteRT does once."""
    if not isinstance(module, (integer.IntegerLayer, integer.WeightOnlyLayer)):
        _note(w, node, module, "float32")
        bias = np.zeros(module.weight.shape[0], np.float32) if module.bias is None else array(module.bias)
        return [w.flat.constant(values.astype(np.float32), f"{node.name}_weight"), w.flat.constant(bias)]
    scale, bias = array(module.scale), np.zeros(len(module.scale), np.float32)
    values = (values.astype(np.int16) << getattr(module, "headroom", 0)).astype(np.int8)
    if module.bias is not None:
        bias = array(module.bias).astype(np.float32)
        if isinstance(module, integer.IntegerLayer):
            bias = bias * (np.float32(module.in_grid.scale) * scale)
    weight = w.flat.constant(values, f"{node.name}_weight", scale, axis=axis)
    real = w.flat.tensor(values.shape, "float32", f"{node.name}_real_weight")
    w.flat.op("DEQUANTIZE", [weight], [real], 5)
    _note(w, node, module, "int8, real")
    return [real, w.flat.constant(bias)]


def _note(w: Writer, node: fx.Node, module: Any, how: str) -> None:
    bytes_ = {"int4": 0.5, "float32": 4}.get(how, 1) * module.weight.numel()
    w.layers.append({"name": node.meta["path"], "stored": how, "bytes": int(np.ceil(bytes_)),
                     "integer": how in ("int8", "int4")})  # fmt: skip


def _float_conv(w: Writer, node: fx.Node, module: Any) -> Value:
    given = {key: getattr(module, key) for key in ("stride", "padding", "dilation", "groups")}
    return _convolution(w, node, module, given)


def _weight_only(w: Writer, node: fx.Node, module: integer.WeightOnlyLayer) -> Value:
    return _linear(w, node, module) if module.kind == "linear" else _convolution(w, node, module, module.attributes)


def _convolution(w: Writer, node: fx.Node, module: Any, given: dict[str, Any]) -> Value:
    """CONV_2D or DEPTHWISE_CONV_2D; of one dimension, over images one pixel high."""
    weight, grid = array(module.weight), getattr(module, "out_grid", None)
    if weight.ndim not in (3, 4):
        raise refuse(node, "a 3-D convolution")
    rank, weight = weight.ndim - 2, weight[:, :, None, :] if weight.ndim == 3 else weight
    x, groups = w.last(w.value(node.args[0], node)), int(given.get("groups", 1))
    kernel = weight.shape[2:]
    stride, dilation = _pair(given["stride"], rank, 1), _pair(given["dilation"], rank, 1)
    x = w.real(x) if grid is None else x
    x, padding = _padded(w, x, _pads(given, kernel, dilation, rank), kernel, stride, dilation)
    depthwise = groups > 1 and groups == x.shape[1]
    settings = {"padding": padding, "strideH": stride[0], "strideW": stride[1], "dilationHFactor": dilation[0],
                "dilationWFactor": dilation[1]}  # fmt: skip
    if depthwise:
        weight, axis = weight.transpose(1, 2, 3, 0), 3
        kind, options = "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions"
        settings["depthMultiplier"] = weight.shape[3] // groups
    else:
        weight, axis, kind, options = weight.transpose(0, 2, 3, 1), 0, "CONV_2D", "Conv2DOptions"
    out = w.make(node, last=True, grid=grid)

    def write(inputs: list[int], to: Value, relu: int, version: int) -> None:
        w.flat.op(kind, inputs, [to.tensor], version, options, fusedActivationFunction=relu, **settings)

    if grid is None:
        inputs = [x.tensor, *_real_weights(w, node, module, weight, axis)]
        write(inputs, out, 0, 6 if groups > 1 and not depthwise else 2)
        return out
    made, version = _weights(w, node, module, weight, axis, {8: 6 if groups > 1 and not depthwise else 3, 4: 7})
    return w.rounded(out, lambda to, relu: write([x.tensor, *made], to, relu, version))


def _pair(value: Any, rank: int, fill: int) -> tuple[int, int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    values = values * rank if len(values) == 1 else values
    first, second = [fill] * (2 - rank) + [int(v) for v in values]
    return first, second


Pads = list[tuple[int, int]]


def _pads(given: dict[str, Any], kernel: Any, dilation: tuple[int, int], rank: int) -> Pads:
    """(begin, end) of height and width."""
    padding, extra = given["padding"], [*given.get("pads", ()), 0, 0, 0, 0]
    if padding == "same":  # torch puts the odd pixel at the end
        totals = [d * (k - 1) for d, k in zip(dilation, kernel)]
        found = [(total // 2, total - total // 2) for total in totals]
    else:
        found = [(p, p) for p in ((0, 0) if padding == "valid" else _pair(padding, rank, 0))]
    rows, columns = found
    rows = (rows[0] + extra[2], rows[1] + extra[3]) if rank == 2 else rows
    return [rows, (columns[0] + extra[0], columns[1] + extra[1])]


def _padded(
    w: Writer, x: Value, pads: Pads, kernel: Any, stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[Value, int]:
    """The input and LiteRT's own padding where that is what is meant, else a PAD before a VALID convolution."""
    if not any(sum(pads, ())):
        return x, VALID
    sizes = x.stored[1:3]
    own = [_same_pads(*one) for one in zip(sizes, kernel, stride, dilation)]
    if own == pads:
        return x, SAME
    if min(sum(pads, ())) < 0:
        raise refuse(None, "a negative padding")
    height, width = (size + sum(pad) for size, pad in zip(sizes, pads))
    space = (height, width) if len(x.shape) == 4 else (width,)
    out = w.moved(x, (*x.shape[:2], *space), x.open_axes, True)
    amounts = np.array([[0, 0], *pads, [0, 0]], np.int32)
    w.flat.op("PAD", [x.tensor, w.flat.constant(amounts)], [out.tensor], 1 if x.grid is None else 2, "PadOptions")
    return out, VALID


def _same_pads(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    total = max(0, (-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size)
    return total // 2, total - total // 2


# --- sums, products, pools ----------------------------------------------------------------------------------------


def _two(kind: str, options: str) -> Emit:
    """ADD or MUL of codes."""

    def emit(w: Writer, node: fx.Node, module: Any) -> Value:
        a, b = w.same_order(*(w.value(arg, node) for arg in node.args))
        out = w.make(node, last=a.last, grid=module.out_grid)
        return w.rounded(out, lambda to, relu: w.flat.op(kind, [a.tensor, b.tensor], [to.tensor], 2, options,
                                                         fusedActivationFunction=relu))  # fmt: skip

    return emit


def _pool(w: Writer, node: fx.Node, module: integer.IntegerPool) -> Value:
    x = w.last(w.value(node.args[0], node))
    out, axes = w.make(node, last=True, grid=module.out_grid), w.flat.constant(np.array([1, 2], np.int32))

    def write(to: Value, _: int) -> None:
        w.flat.op("MEAN", [x.tensor, axes], [to.tensor], 2, "ReducerOptions", keepDims=True)

    return w.rounded(out, write, fuses=False)


def _matmul(w: Writer, node: fx.Node, module: integer.IntegerMatMul) -> Value:
    """BATCH_MATMUL of codes; with a real result, of the real values."""
    a, b = (w.first(w.value(arg, node)) for arg in node.args)
    out = w.make(node, grid=module.out_grid)
    if module.out_grid is None:
        w.flat.op("BATCH_MATMUL", [w.real(a).tensor, w.real(b).tensor], [out.tensor], 1, "BatchMatMulOptions")
        return out

    def write(to: Value, _: int) -> None:
        w.flat.op("BATCH_MATMUL", [a.tensor, b.tensor], [to.tensor], 2, "BatchMatMulOptions")

    return w.rounded(out, write, fuses=False)


def _table(w: Writer, node: fx.Node, module: integer.Table) -> Value:
    """GATHER from the codes of the result, by the code's number."""
    x = w.value(node.args[0], node)
    out = w.make(node, last=x.last, grid=module.out_grid)
    values = (array(module.codes).astype(np.int64) - out.shift).clip(LOW, HIGH).astype(np.int8)
    axes = stored_axes(x.open_axes, len(x.shape), x.last)
    wide, index = (w.flat.tensor(x.stored, "int32", f"{node.name}_{part}", None, 0, axes) for part in ("wide", "index"))
    w.flat.op("CAST", [x.tensor], [wide], 1, "CastOptions")
    w.flat.op("ADD", [wide, w.flat.constant(np.array([x.shift], np.int32))], [index], 1, "AddOptions")
    scale, zero = module.out_grid.scale, module.out_grid.zero_point - out.shift
    table = w.flat.constant(values, f"{node.name}_table", [scale], zero)
    w.flat.op("GATHER", [table, index], [out.tensor], 2, "GatherOptions", axis=0)
    return out


def _layer_norm(w: Writer, node: fx.Node, module: nn.LayerNorm) -> Value:
    """Mean, squared difference and reciprocal root over the last axes (arXiv 1607.06450)."""
    x = w.first(w.real(w.value(node.args[0], node)))
    rank, f = len(x.shape), w.flat
    count = len(module.normalized_shape)
    axes = f.constant(np.arange(rank - count, rank, dtype=np.int32))
    narrow = Value(-1, (*x.shape[: rank - count], *[1] * count), x.open_axes)
    mean, variance, shifted, root = (w.like(narrow, None) for _ in range(4))
    squares, centred, scaled = (w.like(x, None) for _ in range(3))
    f.op("MEAN", [x.tensor, axes], [mean.tensor], 1, "ReducerOptions", keepDims=True)
    f.op("SQUARED_DIFFERENCE", [x.tensor, mean.tensor], [squares.tensor], 1, "SquaredDifferenceOptions")
    f.op("MEAN", [squares.tensor, axes], [variance.tensor], 1, "ReducerOptions", keepDims=True)
    f.op("ADD", [variance.tensor, f.constant(np.array([module.eps], np.float32))], [shifted.tensor], 1, "AddOptions")
    f.op("RSQRT", [shifted.tensor], [root.tensor])
    f.op("SUB", [x.tensor, mean.tensor], [centred.tensor], 1, "SubOptions")
    f.op("MUL", [centred.tensor, root.tensor], [scaled.tensor], 1, "MulOptions")
    for kind, values in (("MUL", module.weight), ("ADD", module.bias)):
        if values is not None:
            out = w.like(x, None)
            f.op(kind, [scaled.tensor, f.constant(array(values))], [out.tensor], 1, f"{kind.capitalize()}Options")
            scaled = out
    return scaled


MODULES: dict[type, Emit] = {
    integer.Quantize: _quantize,
    integer.Dequantize: _dequantize,
    integer.ClampCodes: _clamp,
    integer.IntegerLayer: _layer,
    integer.WeightOnlyLayer: _weight_only,
    integer.IntegerAdd: _two("ADD", "AddOptions"),
    integer.IntegerMul: _two("MUL", "MulOptions"),
    integer.IntegerPool: _pool,
    integer.IntegerMatMul: _matmul,
    integer.Table: _table,
    nn.Conv1d: _float_conv,
    nn.Conv2d: _float_conv,
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
}
