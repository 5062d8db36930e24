"""Nodes with constant weights as torch's layers, so that they can be pruned and quantized.

A maker gets the node's attributes, its constant inputs by position (None where an input is computed) and the rank of
its data; it returns a layer, or None when the node is no layer (then the operator of that name runs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.models.from_onnx.windows import padded, window_pads

Constants = list[NDArray[Any] | None]
Maker = Callable[[dict[str, Any], Constants, tuple[int, ...]], "nn.Module | None"]

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_BATCH_NORM = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def _set(parameter: Any, values: Any) -> None:
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.array(values, np.float32)).reshape(parameter.shape))


def _weights(layer: nn.Module, weight: Any, bias: Any) -> nn.Module:
    _set(layer.weight, weight)
    if bias is not None:
        _set(layer.bias, bias)
    return layer


class Padded(nn.Module):
    """A layer after a padding that differs at the two ends."""

    def __init__(self, layer: nn.Module, begins: list[int], ends: list[int]) -> None:
        super().__init__()
        self.layer, self.begins, self.ends = layer, begins, ends

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(padded(x, self.begins, self.ends))


def _conv(a: dict[str, Any], constants: Constants, shape: tuple[int, ...]) -> nn.Module | None:
    weight, bias = constants[1], constants[2] if len(constants) > 2 else None
    if weight is None or (len(constants) > 2 and bias is None and a["given"][2]):
        return None
    rank, groups = weight.ndim - 2, a.get("group", 1)
    begins, ends = window_pads(a, shape[2:], weight.shape[2:])
    same = begins == ends
    layer = _CONV[rank](
        weight.shape[1] * groups, weight.shape[0], weight.shape[2:], tuple(a.get("strides") or [1] * rank),
        tuple(begins) if same else 0, tuple(a.get("dilations") or [1] * rank), groups, bias is not None,
    )  # fmt: skip
    made = _weights(layer, weight, bias)
    return made if same else Padded(made, begins, ends)


def _transposed(a: dict[str, Any], constants: Constants, shape: tuple[int, ...]) -> nn.Module | None:
    weight, bias = constants[1], constants[2] if len(constants) > 2 else None
    if weight is None:
        return None
    rank, groups = weight.ndim - 2, a.get("group", 1)
    pads = list(a.get("pads") or [0] * 2 * rank)
    extra = list(a.get("output_padding") or [0] * rank)
    if a.get("output_shape") or a.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise UserError("is a ConvTranspose that is given its output's size; only paddings have a torch form here.")
    for axis in range(rank):  # less padding at the end is what torch calls output padding
        extra[axis] += pads[axis] - pads[rank + axis]
    if any(e < 0 for e in extra):
        raise UserError("is a ConvTranspose that is padded more at the end than at the beginning.")
    layer = _TRANSPOSED[rank](
        weight.shape[0], weight.shape[1] * groups, weight.shape[2:], tuple(a.get("strides") or [1] * rank),
        tuple(pads[:rank]), tuple(extra), groups, bias is not None, tuple(a.get("dilations") or [1] * rank),
    )  # fmt: skip
    return _weights(layer, weight, bias)


def _gemm(a: dict[str, Any], constants: Constants, shape: tuple[int, ...]) -> nn.Module | None:
    weight, bias = constants[1], constants[2] if len(constants) > 2 else None
    if weight is None or weight.ndim != 2 or a.get("transA") or (len(constants) > 2 and bias is None):
        return None
    rows = (weight if a.get("transB") else weight.T) * a.get("alpha", 1.0)
    if bias is not None and bias.size not in (1, rows.shape[0]):
        return None
    layer = nn.Linear(rows.shape[1], rows.shape[0], bias is not None)
    shift = None if bias is None else np.broadcast_to(bias.reshape(-1) * a.get("beta", 1.0), (rows.shape[0],))
    return _weights(layer, rows, shift)


def _matmul(a: dict[str, Any], constants: Constants, shape: tuple[int, ...]) -> nn.Module | None:
    weight, bias = constants[1], constants[2] if len(constants) > 2 else None
    if weight is None or weight.ndim != 2:
        return None
    return _weights(nn.Linear(weight.shape[0], weight.shape[1], bias is not None), weight.T, bias)


def _batch_norm(a: dict[str, Any], constants: Constants, shape: tuple[int, ...]) -> nn.Module | None:
    if any(c is None for c in constants[1:5]):
        return None
    weight, bias, mean, variance = constants[1:5]
    layer = _BATCH_NORM[max(0, len(shape) - 2)](weight.size, a.get("epsilon", 1e-5), 1 - a.get("momentum", 0.9))  # type: ignore[union-attr]
    _set(layer.running_mean, mean)
    _set(layer.running_var, variance)
    return _weights(layer, weight, bias)


def _layer_norm(a: dict[str, Any], constants: Constants, shape: tuple[int, ...]) -> nn.Module | None:
    axis, weight = a.get("axis", -1) % len(shape), constants[1]
    if weight is None or weight.shape != shape[axis:]:
        return None
    bias = constants[2] if len(constants) > 2 else None
    return _weights(nn.LayerNorm(weight.shape, a.get("epsilon", 1e-5), bias=bias is not None), weight, bias)


def _rms_norm(a: dict[str, Any], constants: Constants, shape: tuple[int, ...]) -> nn.Module | None:
    axis, weight = a.get("axis", -1) % len(shape), constants[1]
    if weight is None or weight.shape != shape[axis:]:
        return None
    return _weights(nn.RMSNorm(weight.shape, a.get("epsilon", 1e-5)), weight, None)


def _instance_norm(a: dict[str, Any], constants: Constants, shape: tuple[int, ...]) -> nn.Module | None:
    weight, bias = constants[1:3]
    if weight is None or bias is None:
        return None
    return _weights(_INSTANCE_NORM[len(shape) - 2](weight.size, a.get("epsilon", 1e-5), affine=True), weight, bias)


def _group_norm(a: dict[str, Any], constants: Constants, shape: tuple[int, ...]) -> nn.Module | None:
    weight, bias = constants[1:3]
    if weight is None or bias is None:
        return None
    each = shape[1] // weight.size  # up to opset 20 one value per group
    layer = nn.GroupNorm(a["num_groups"], shape[1], a.get("epsilon", 1e-5))
    return _weights(layer, np.repeat(weight, each), np.repeat(bias, each))


def _embedding(a: dict[str, Any], constants: Constants, shape: tuple[int, ...]) -> nn.Module | None:
    table = constants[0]
    if table is None or table.ndim != 2 or table.dtype.kind != "f" or a.get("axis", 0) or constants[1] is not None:
        return None
    return _weights(nn.Embedding(*table.shape), table, None)


class Recurrent(nn.Module):
    """LSTM, GRU or RNN as ONNX gives its results: Y [T, directions, B, H], then the final state (and cell)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, state = self.inner(x)
        directions = 2 if self.inner.bidirectional else 1
        y = y.unflatten(-1, (directions, -1)).transpose(1, 2)
        return (y, *state) if isinstance(state, tuple) else (y, state)


_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}  # ONNX's gates in torch's order


def _recurrent(a: dict[str, Any], constants: Constants, shape: tuple[int, ...]) -> nn.Module | None:
    kind, (weight, recurrent) = a["op"], constants[1:3]
    if weight is None or recurrent is None:
        return None
    _check_recurrent(a, constants)
    bias = constants[3] if len(constants) > 3 else None
    options: dict[str, Any] = {"bias": bias is not None, "bidirectional": weight.shape[0] == 2}
    if kind == "RNN":
        options["nonlinearity"] = (a.get("activations") or ["Tanh"])[0].lower()
    inner = getattr(nn, kind)(weight.shape[2], recurrent.shape[2], **options)
    for direction, suffix in enumerate(("", "_reverse")[: weight.shape[0]]):
        _set(getattr(inner, f"weight_ih_l0{suffix}"), _ordered(weight[direction], kind))
        _set(getattr(inner, f"weight_hh_l0{suffix}"), _ordered(recurrent[direction], kind))
        if bias is not None:
            first, second = np.split(bias[direction], 2)
            _set(getattr(inner, f"bias_ih_l0{suffix}"), _ordered(first, kind))
            _set(getattr(inner, f"bias_hh_l0{suffix}"), _ordered(second, kind))
    return Recurrent(inner)


def _ordered(rows: NDArray[Any], kind: str) -> NDArray[Any]:
    gates = np.split(rows, len(_GATES[kind]))
    return np.concatenate([gates[i] for i in _GATES[kind]])


def _check_recurrent(a: dict[str, Any], constants: Constants) -> None:
    usual = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}.get(a["op"])
    found = a.get("activations")
    if usual and found and found[: len(usual)] != usual:
        raise UserError(f"is a {a['op']} with the activations {found}; torch has {usual} alone.")
    if a["op"] == "GRU" and not a.get("linear_before_reset"):
        raise UserError("is a GRU that resets before its product (linear_before_reset 0); torch resets after it.")
    if a.get("direction") == "reverse" or a.get("layout") or a.get("clip"):
        raise UserError("runs backwards alone, batch first or clipped, which torch's layer does not.")
    for given, values in list(zip(a["given"], constants))[4:]:
        if given and (values is None or values.any()):
            raise UserError("starts from a state or ends at lengths that are not zero, which has no torch form here.")


LAYERS: dict[str, Maker] = {
    "Conv": _conv,
    "ConvTranspose": _transposed,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "Gather": _embedding,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
}
# Which input of the node feeds its layer.
DATA = {"Gather": 1}
