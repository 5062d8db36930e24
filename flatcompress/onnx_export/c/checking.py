"""Whether every step of a C model gives what its own inputs give, computed anew in float64.

Outputs of a model with steps on real values may differ from onnxruntime's, because a value at the edge of two codes may
become either and everything behind it follows. A step alone may not: its codes are the nearest ones but for a rounding.
So the C is run with a trace of every step's result, and each is compared with what `torch` makes in float64 of the
inputs that the C itself had.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from flatcompress.onnx_export.c import build, ir

SAMPLES = 16
CODE = 1e-3, 2e-5  # of a step, and of the largest value in steps: what float32 may add to half a step
REAL = 2e-5  # of the largest value
Values = dict[str, Tensor]

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "softmax": lambda x: x.softmax(-1),
}


def check(folder: Path, name: str, program: ir.Program, samples: NDArray[np.float32]) -> dict[str, Any] | None:
    """``steps`` compared, ``values`` in them, ``other``: codes that are not the nearest, within a rounding; ``wrong``:
    what is beyond, by module. None without a C compiler. Integer layers and the rows of real values are compared.
    """
    command = build.compiler()
    if command is None:
        return None
    chosen = samples[:SAMPLES]
    with tempfile.TemporaryDirectory() as place:
        target = Path(place) / "model"
        build.host_program(folder, name, target, command, ("-O2", *build.traced()))
        sizes = [step.out.bytes for step in program.steps if step.out is not None]
        count = int(np.prod(program.outputs))
        raw = build.outputs(target, chosen, sum(sizes) + 4 * count, np.uint8)
    values, found, at = {}, {"steps": 0, "values": 0, "other": 0, "wrong": []}, 0
    for step in program.steps:
        if step.out is None:
            continue
        piece, at = np.ascontiguousarray(raw[:, at : at + step.out.bytes]), at + step.out.bytes
        own = piece.view(np.float32) if isinstance(step.out, ir.Real) else codes(piece, step.out)
        values[step.out.name] = torch.from_numpy(own.astype(np.float64))
        if isinstance(step, ir.Rows) or (isinstance(step, ir.Conv) and step.add is None):
            _compare(step, values, found)
    return found


def codes(raw: NDArray[np.uint8], tensor: ir.Codes) -> NDArray[np.uint8]:
    """The codes [N, pixels * channels] of a tensor that lies in ``raw`` [N, bytes], packed or not."""
    if not tensor.packed:
        return raw
    halves = np.stack([raw & 15, raw >> 4], 2).reshape(len(raw), tensor.pixels, -1)
    return np.ascontiguousarray(halves[..., : tensor.channels]).reshape(len(raw), -1)


def _compare(step: ir.Rows | ir.Conv, values: Values, found: dict[str, Any]) -> None:
    expected, own = _expected(step, values), values[step.out.name]
    expected = expected.reshape(own.shape)
    if isinstance(step.out, ir.Real):
        beyond = (expected - own).abs() > REAL * expected.abs().max()
        other = 0
    else:
        zero, low, high = step.out.zero, step.out.low, step.out.high
        limited = expected.clamp(low - zero, high - zero)
        distance = (limited - (own - zero)).abs() - 0.5
        beyond = distance > CODE[0] + CODE[1] * limited.abs().max()
        other = int((distance > 0).sum())
    found["steps"] += 1
    found["values"] += own.numel()
    found["other"] += other
    if bool(beyond.any()):
        found["wrong"].append({"module": step.path, "values": int(beyond.sum())})


def _expected(step: ir.Rows | ir.Conv, values: Values) -> Tensor:
    """Real values; where the result is codes, in steps of its grid."""
    if isinstance(step, ir.Conv):
        return _layer(step, values)
    rows = _begin(step, values)
    for name, operand in step.changes:
        rows = _changed(rows, name, operand, values)
    if step.mean:
        rows = rows.mean(1)
    return rows / step.out.grid.scale if isinstance(step.out, ir.Codes) and not step.rounded else rows


def _begin(step: ir.Rows, values: Values) -> Tensor:
    if isinstance(step.begin, ir.Conv):
        return _layer(step.begin, values)
    if isinstance(step.begin, ir.Product):
        return _product(step, step.begin, values)
    source = step.sources[0]
    held = values[source.name]
    if isinstance(source, ir.Codes):
        held = (held - source.zero) * source.grid.scale
    places = step.first + torch.arange(step.rows)[:, None] * step.stride + torch.arange(step.columns)
    return held[:, places]


def _layer(conv: ir.Conv, values: Values) -> Tensor:
    """[N, pixels, outputs]: exact sums, times the scale."""
    source, window = conv.sources[0], conv.window
    x = values[source.name].reshape(-1, source.height, source.width, source.channels).permute(0, 3, 1, 2) - source.zero
    (top, left), pads = window.pads, []
    for axis, (size, given, before) in enumerate(((conv.height, source.height, top), (conv.width, source.width, left))):
        reach = (size - 1) * window.stride[axis] + (window.kernel[axis] - 1) * window.dilation[axis] + 1
        pads.append((before, reach - given - before))
    x = F.pad(x, [*pads[1], *pads[0]])
    weight = torch.from_numpy((conv.weight << conv.headroom).astype(np.float64)).permute(0, 3, 1, 2)
    total = F.conv2d(x, weight, None, window.stride, 0, window.dilation, conv.groups)
    total = total.permute(0, 2, 3, 1).flatten(1, 2) + torch.from_numpy(conv.bias.astype(np.float64))
    real = total * torch.from_numpy(conv.scale.astype(np.float64))
    return real if conv.late is None else real + torch.from_numpy(conv.late.astype(np.float64))


def _product(step: ir.Rows, product: ir.Product, values: Values) -> Tensor:
    operands = []
    sizes = (product.rows, product.columns)
    for source, (first, head, row, deep), size in zip(step.sources, (product.first, product.second), sizes):
        places = torch.arange(product.heads)[:, None, None] * head + torch.arange(size)[:, None] * row
        places = first + places + torch.arange(product.depth) * deep
        operands.append(values[source.name][:, places] - source.zero)
    made = torch.einsum("nhrk,nhck->nrhc", *operands) * float(product.factor)
    return made.flatten(1, 2)


def _changed(rows: Tensor, name: str, operand: Any, values: Values) -> Tensor:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name](rows)
    if name == "norm":
        weight, bias = (torch.from_numpy(part.astype(np.float64)) for part in operand[:2])
        return F.layer_norm(rows, rows.shape[-1:], weight, bias, operand[2])
    if name == "add":
        return rows + values[operand.name].reshape(rows.shape)
    if name in ("scale", "divide"):
        return rows * operand if name == "scale" else rows / operand
    constant = torch.from_numpy(operand.astype(np.float64)).reshape(-1, rows.shape[-1])
    return rows + constant if name == "constant" else rows * constant
