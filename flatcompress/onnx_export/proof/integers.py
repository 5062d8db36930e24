"""The certificate's second verdict: which layers run on integers, and what share of the network they are.

Shares are of all weights and of all multiply-accumulates, matrix products of two activations and recurrent layers
among them; that of the time is onnxruntime's own, kernel by kernel.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from flatcompress.modules import weight_of
from flatcompress.onnx_export.lower.lowering import function_path
from flatcompress.onnx_export.runtime import kernel_time
from flatcompress.onnx_export.runtime.sessions import INTEGER_KERNELS, Kernels

aten = torch.ops.aten
_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default}
_RECURRENT = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}
_WEIGHTED = {
    aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default,
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """One layer or product: its name in the file, weights, and multiply-accumulates of one sample."""

    name: str
    weights: int
    macs: int


def works(reference: fx.GraphModule) -> list[Work]:
    """Everything in a reference that multiplies and accumulates, in order, under its name in the file."""
    seen: Counter[str] = Counter()
    found = []
    for node in reference.graph.nodes:
        work = _of_module(reference, node) if node.op == "call_module" else _of_function(reference, node)
        if work is not None:
            seen[work.name] += 1
            number = seen[work.name]
            found.append(work if number == 1 else Work(f"{work.name}:{number}", work.weights, work.macs))
    return found


def _outputs(node: fx.Node) -> int:
    """Values of one sample in a node's result."""
    shape = node.meta["shape"]
    return math.prod(shape) // max(1, shape[0])


def _of_module(reference: fx.GraphModule, node: fx.Node) -> Work | None:
    module = reference.get_submodule(str(node.target))
    name = str(node.meta.get("path") or node.name)
    weight = weight_of(module)
    if weight is not None and weight.dim() > 1 and not isinstance(module, nn.Embedding | nn.LayerNorm):
        if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            return Work(name, weight.numel(), _outputs(node.args[0]) * weight[0].numel())  # type: ignore[arg-type]
        return Work(name, weight.numel(), _outputs(node) * weight[0].numel())
    if type(module).__name__ == "IntegerMatMul":
        return Work(name, 0, _outputs(node) * node.args[0].meta["shape"][-1])  # type: ignore[union-attr]
    return None


def _of_function(reference: fx.GraphModule, node: fx.Node) -> Work | None:
    if node.op != "call_function":
        return None
    if node.target in _PRODUCTS:
        return Work(function_path(node), 0, _outputs(node) * node.args[0].meta["shape"][-1])  # type: ignore[union-attr]
    if node.target in _RECURRENT:
        sizes = [math.prod(p.meta["shape"]) for p in node.args[2] if len(p.meta["shape"]) > 1]  # type: ignore[union-attr]
        length = node.args[0].meta["shape"][1 if node.args[-1] else 0]  # type: ignore[union-attr]
        return Work(function_path(node), sum(sizes), sum(sizes) * length)
    if node.target in _WEIGHTED:
        shape = node.args[1].meta["shape"]  # type: ignore[union-attr]
        return Work(function_path(node), math.prod(shape), _outputs(node) * math.prod(shape[1:]))
    return None


def verdict(reference: fx.GraphModule, found: Kernels, path: Path | None, expected: bool) -> dict[str, Any]:
    """The certificate's part: counts, shares, and a row per layer that computes in floats.

    path: the file, to time its kernels; None leaves the time out. expected: whether the profile is meant to run on
    integers at all; ``holds`` is null where it is not.
    """
    rows = works(reference)
    floats = [row for row in rows if found.of.get(row.name) not in INTEGER_KERNELS]
    weights, macs = sum(row.weights for row in rows), sum(row.macs for row in rows)
    time = None if path is None else time_share(path)
    return {
        "holds": (not floats) if expected else None,
        "layers": len(rows),
        "integer_layers": len(rows) - len(floats),
        "share_of_weights": _share(weights - sum(row.weights for row in floats), weights),
        "share_of_macs": _share(macs - sum(row.macs for row in floats), macs),
        "share_of_time": time,
        "floats": [
            {
                "name": row.name,
                "kernel": found.of.get(row.name),
                "share_of_weights": _share(row.weights, weights),
                "share_of_macs": _share(row.macs, macs),
            }
            for row in floats
        ],
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def time_share(path: Path) -> float | None:
    """The share of the kernels' time that integer kernels take, one sample, one thread; null where nothing is told."""
    total = integer = 0.0
    for event in kernel_time.kernel_events(path.read_bytes(), most=kernel_time.FEWEST_RUNS):
        total += event["dur"]
        if event.get("args", {}).get("op_name") in INTEGER_KERNELS:
            integer += event["dur"]
    return integer / total if total else None


def sentence(part: dict[str, Any], most: int = 6) -> str | None:
    """What to say of the layers in floats, or None when there are none or the profile has no integers."""
    rows = part.get("floats")
    if part.get("holds") is not False or not rows:
        return None
    names = ", ".join(str(row["name"]) for row in rows[:most]) + (" ..." if len(rows) > most else "")
    shares = [
        f"{value:.1%} of the {what}"
        for what, value in (
            ("weights", _rest(part.get("share_of_weights"))),
            ("multiply-accumulates", _rest(part.get("share_of_macs"))),
        )
        if value is not None
    ]
    time = part.get("share_of_time")
    told = f"; integer kernels take {time:.0%} of the time" if isinstance(time, float) else ""
    return f"{len(rows)} of {part['layers']} layers compute in floats ({', '.join(shares)}{told}): {names}."


def required(part: dict[str, Any], profile: str) -> list[str]:
    """What stands against a certificate that requires integers throughout."""
    if part["holds"] is None:
        return [f"require_integer: profile {profile!r} is not meant to run on integers."]
    found = sentence(part)
    return [f"require_integer: {found}"] if found else []


def _rest(share: float | None) -> float | None:
    return None if share is None else 1 - share
