"""Emitters for normalisations, as operators of the graph and as layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from flatcompress.onnx_export.emit.reductions import variance
from flatcompress.onnx_export.emit.values import as_shape_of, axes_input, per_channel, rank_of, shape_of
from flatcompress.onnx_export.emit.writer import FunctionEmitter, ModuleEmitter, Writer

aten = torch.ops.aten
Vector = Any  # a node, a tensor of a layer, or None


def _name(w: Writer, vector: Vector) -> str:
    return w.constant(vector) if isinstance(vector, Tensor) else w.tensor(vector)


def _affine(w: Writer, x: str, weight: Vector, bias: Vector, rank: int) -> str:
    """x times weight plus bias, both per channel."""
    if weight is not None:
        x = w.builder.op("Mul", [x, per_channel(w, weight, rank)])
    return w.builder.op("Add", [x, per_channel(w, bias, rank)]) if bias is not None else x


def layer_norm(
    w: Writer, x: fx.Node, shape: Sequence[int], weight: Vector, bias: Vector, eps: float, name: str = ""
) -> str:
    """LayerNormalization, since opset 17 (arXiv 1607.06450)."""
    scale = torch.ones(list(shape)) if weight is None else weight
    inputs = [w.tensor(x), _name(w, scale)] + ([_name(w, bias)] if bias is not None else [])
    return w.builder.op("LayerNormalization", inputs, name=name, axis=-len(shape), epsilon=float(eps))


def rms_norm(w: Writer, x: fx.Node, shape: Sequence[int], weight: Vector, eps: float | None, name: str = "") -> str:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467, eq. 4)."""
    b, source = w.builder, w.tensor(x)
    axes = list(range(rank_of(x) - len(shape), rank_of(x)))
    mean = axes_input(w, "ReduceMean", b.op("Mul", [source, source]), axes, 1)
    small = w.number(torch.finfo(torch.float32).eps if eps is None else float(eps))
    made = b.op("Div", [source, b.op("Sqrt", [b.op("Add", [mean, small])])], name=name)
    return b.op("Mul", [made, _name(w, weight)]) if weight is not None else made


def instance_norm(w: Writer, x: fx.Node, weight: Vector, bias: Vector, eps: float, name: str = "") -> str:
    """InstanceNormalization; weight and bias are ones and zeros where there are none."""
    channels = shape_of(x)[1]
    scale = torch.ones(channels) if weight is None else weight
    shift = torch.zeros(channels) if bias is None else bias
    inputs = [w.tensor(x), _name(w, scale), _name(w, shift)]
    return w.builder.op("InstanceNormalization", inputs, name=name, epsilon=float(eps))


def group_norm(w: Writer, x: fx.Node, groups: int, weight: Vector, bias: Vector, eps: float, name: str = "") -> str:
    """InstanceNormalization over the groups (arXiv 1803.08494), then weight and bias per channel."""
    b = w.builder
    grouped = b.op("Reshape", [w.tensor(x), b.ints([0, groups, -1])])
    ones, zeros = w.number([1.0] * groups), w.number([0.0] * groups)
    normal = b.op("InstanceNormalization", [grouped, ones, zeros], name=name, epsilon=float(eps))
    back = b.op("Reshape", [normal, as_shape_of(w, x)])
    return _affine(w, back, weight, bias, rank_of(x))


def batch_norm(
    w: Writer, x: fx.Node, weight: Vector, bias: Vector, mean: Vector, var: Vector, eps: float, name: str = ""
) -> str:
    """BatchNormalization; without running statistics those of the batch at hand, as torch takes them."""
    b, channels = w.builder, shape_of(x)[1]
    if mean is not None and var is not None:
        scale = torch.ones(channels) if weight is None else weight
        shift = torch.zeros(channels) if bias is None else bias
        inputs = [w.tensor(x)] + [_name(w, v) for v in (scale, shift, mean, var)]
        return b.op("BatchNormalization", inputs, name=name, epsilon=float(eps))
    axes, source = [0, *range(2, rank_of(x))], w.tensor(x)
    centred = b.op("Sub", [source, axes_input(w, "ReduceMean", source, axes, 1)])
    spread = b.op("Sqrt", [b.op("Add", [variance(w, source, axes, 1), w.number(float(eps))])])
    return _affine(w, b.op("Div", [centred, spread], name=name), weight, bias, rank_of(x))


# --- operators --------------------------------------------------------------------------------------------------------


def _layer_norm(
    w: Writer, node: fx.Node, x: fx.Node, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> str:
    return layer_norm(w, x, shape, weight, bias, eps)


def _rms_norm(w: Writer, node: fx.Node, x: fx.Node, shape: Any, weight: Any = None, eps: float | None = None) -> str:
    return rms_norm(w, x, shape, weight, eps)


def _group_norm(
    w: Writer, node: fx.Node, x: fx.Node, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> str:
    return group_norm(w, x, groups, weight, bias, eps)


def _instance_norm(
    w: Writer,
    node: fx.Node,
    x: fx.Node,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> str:
    if use_input_stats or mean is None:
        return instance_norm(w, x, weight, bias, eps)
    return batch_norm(w, x, weight, bias, mean, var, eps)


def _batch_norm(
    w: Writer,
    node: fx.Node,
    x: fx.Node,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> str:
    if training:
        mean = var = None
    return batch_norm(w, x, weight, bias, mean, var, eps)


NORMS: dict[Any, FunctionEmitter] = {
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.instance_norm.default: _instance_norm,
    aten.batch_norm.default: _batch_norm,
}


# --- layers -----------------------------------------------------------------------------------------------------------


def _batch_norm_layer(w: Writer, node: fx.Node, module: Any) -> str:
    weight, bias = (module.weight, module.bias) if module.affine else (None, None)
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    return batch_norm(w, x, weight, bias, module.running_mean, module.running_var, module.eps, node.meta["path"])


def _instance_norm_layer(w: Writer, node: fx.Node, module: Any) -> str:
    weight, bias = (module.weight, module.bias) if module.affine else (None, None)
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    if module.track_running_stats:
        return batch_norm(w, x, weight, bias, module.running_mean, module.running_var, module.eps, node.meta["path"])
    return instance_norm(w, x, weight, bias, module.eps, node.meta["path"])


def _layer_norm_layer(w: Writer, node: fx.Node, module: nn.LayerNorm) -> str:
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    return layer_norm(w, x, module.normalized_shape, module.weight, module.bias, module.eps, node.meta["path"])


def _rms_norm_layer(w: Writer, node: fx.Node, module: nn.RMSNorm) -> str:
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    return rms_norm(w, x, module.normalized_shape, module.weight, module.eps, node.meta["path"])


def _group_norm_layer(w: Writer, node: fx.Node, module: nn.GroupNorm) -> str:
    weight, bias = (module.weight, module.bias) if module.affine else (None, None)
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    return group_norm(w, x, module.num_groups, weight, bias, module.eps, node.meta["path"])


NORM_LAYERS: dict[type[nn.Module], ModuleEmitter] = {
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm_layer),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _instance_norm_layer),
    nn.LayerNorm: _layer_norm_layer,
    nn.RMSNorm: _rms_norm_layer,
    nn.GroupNorm: _group_norm_layer,
}
