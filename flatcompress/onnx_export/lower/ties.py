"""Scales at which no sum of integers lies on a rounding boundary, so that every runtime rounds alike.

A runtime brings an integer sum to the next grid by a float32 factor m = s_x * s_w / s_y. Sums whose product with m lies
halfway between two codes go up in one runtime and down in another, by the order in which each multiplies and adds: a
few codes in a million, and each may be many output steps further on. With m = p / q, q odd, every product is a multiple
of 1 / q and none is nearer than 1 / (2 q) to the middle between two codes, far more than the last bits of a float32.
`untie` moves the scales of a quantized network there, each by less than `NUDGE` of itself.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, fx, nn

from flatcompress.graph.lowering_spec import ActivationSpec
from flatcompress.onnx_export.lower import integer
from flatcompress.onnx_export.lower.integer import Grid
from flatcompress.onnx_export.lower.lowering import QUANTIZED, lower

NUDGE = 2.0**-10  # at most so much of itself is a scale moved
MARGIN = 4e-5  # of a code: what float32 sums in another order may differ by
LARGEST = 1 << 14  # denominators that are tried: 1 / (2 q) stays above half of `MARGIN`
_TRIES = 2000  # scales tried for an addition: each is free of ties with a probability of a few per cent


@runtime_checkable
class Movable(Protocol):
    """A quantizer whose scale is its own to move."""

    scale: Tensor

    def move_scale(self, factor: Tensor) -> None:
        """Multiply the scale, or each of the scales, by a positive number."""

    def activation_spec(self) -> ActivationSpec:
        """The grid as plain numbers."""


@dataclass
class Untied:
    """``moved``: quantizers whose scales were moved. ``left``: {layer or operator: why its scales stay}."""

    moved: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain values: how many were moved, and what was left."""
        return {"moved": len(self.moved), "left": dict(self.left)}


def fraction(values: Tensor, nudge: float = NUDGE) -> Tensor:
    """The p / q, q odd and as small as there is one, within ``nudge`` of each of ``values``; NaN where there is none.

    >>> (fraction(torch.tensor([0.5, 0.3334]), 0.001) * torch.tensor([1001, 3])).tolist()
    [500.0, 1.0]
    """
    values, found = values.double(), torch.full_like(values, float("nan"), dtype=torch.float64)
    first = 1
    while first < LARGEST and bool((open_ := found.isnan()).any()):
        last = min(2 * first + 63, first + 512, LARGEST)  # few at first: most are found there
        q, first = torch.arange(first, last, 2, dtype=torch.float64), last
        wanted = values[open_].unsqueeze(1)
        p = torch.round(wanted * q)
        near = ((p / q - wanted).abs() <= nudge * wanted) & (p > 0)
        which = near.to(torch.uint8).argmax(1)
        chosen = (p / q).gather(1, which.unsqueeze(1)).squeeze(1)
        found[open_] = torch.where(near.any(1), chosen, found[open_])
    return found


def untie(model: nn.Module, example_input: Any) -> Untied:
    """Move the scales of a calibrated, quantized ``model`` in place: of additions, products and pools the result's, of
    weighted layers the weights'. ``example_input``: as `lower` takes it.

    A scale that is no quantizer's own parameter, or that several layers share, stays; `Untied.left` says which. The
    weights' integers are those of the moved scales, so measure the model after this and not before.
    """
    found = Untied()
    reference = lower(model, example_input)
    _results(model, reference, found)
    _layers(model, lower(model, example_input) if found.moved else reference, found)
    return found


def _results(model: nn.Module, reference: fx.GraphModule, found: Untied) -> None:
    """The results' scales of operators on codes, in the order of the graph: each is the next one's operand."""
    owners = {name: path for path, (name, _) in reference.meta[QUANTIZED].items()}
    modules, moved = dict(model.named_modules()), dict[str, float]()
    for node, module, out in _rounded(reference):
        if isinstance(module, integer.IntegerLayer):
            continue
        path = owners.get(node.name, "")
        quantizer = getattr(modules.get(path), "tensor_quant", None)
        where = node.meta.get("path") or node.name
        if not isinstance(quantizer, Movable):
            found.left[where] = "the result's scale is no parameter of its own"
            continue
        scales = [_scale(reference, operand, moved) for operand in node.all_input_nodes]
        chosen = _untied_result(module, out, scales, node.all_input_nodes[0])
        if chosen is None:
            found.left[where] = f"no scale within {NUDGE:.1g} of its own is free of ties"
        elif chosen != out.scale:
            quantizer.move_scale(torch.tensor(chosen / out.scale, dtype=torch.float64))
            moved[node.name] = quantizer.activation_spec().scale
            found.moved.append(path)


def _scale(reference: fx.GraphModule, node: fx.Node, moved: dict[str, float]) -> float:
    """The scale of an operand's codes as it is now: of the operator that made them."""
    while node.name not in moved:
        module = reference.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, integer.Quantize):
            return module.grid.scale
        if isinstance(module, integer.Rounded | integer.Table) and module.out_grid is not None:
            return module.out_grid.scale
        node = node.all_input_nodes[0]  # moves codes, or limits them
    return moved[node.name]


def _untied_result(module: integer.Rounded, out: Grid, scales: list[float], first: fx.Node) -> float | None:
    """A scale of the result, close to its own, at which no codes of the operands tie; None where there is none."""
    if isinstance(module, integer.IntegerAdd):
        return _untied_sum(module, out, scales if len(scales) == 2 else scales * 2)
    if isinstance(module, integer.IntegerPool):
        product = scales[0] / math.prod(first.meta["shape"][-2:])
    else:
        product = math.prod(scales if len(scales) == 2 else scales * 2)
    m = float(fraction(torch.tensor([product / out.scale], dtype=torch.float64))[0])
    return None if math.isnan(m) else product / m


def _untied_sum(module: integer.IntegerAdd, out: Grid, scales: list[float]) -> float | None:
    a, b = (torch.arange(grid.low, grid.high + 1) - grid.zero_point for grid in (module.first, module.second))
    sums = (a.double() * scales[0]).unsqueeze(1) + b.double() * scales[1]
    codes = sums / out.scale + out.zero_point
    sums = sums[(codes >= out.low - 1) & (codes <= out.high + 1)]
    for i in range(_TRIES):
        scale = out.scale * (1 + NUDGE * ((i + 1) // 2) / (_TRIES // 2) * (-1) ** i)
        value = sums / scale
        if not bool(((value - value.floor() - 0.5).abs() < MARGIN).any()):
            return scale
    return None


def _layers(model: nn.Module, reference: fx.GraphModule, found: Untied) -> None:
    """The weights' scales of layers whose result is rounded to codes."""
    layers = [(node.meta["path"], module, out) for node, module, out in _rounded(reference)
              if isinstance(module, integer.IntegerLayer)]  # fmt: skip
    modules = dict(model.named_modules())
    calls = Counter(path for path, _, _ in layers)
    for path, module, out in layers:
        quantizer = getattr(getattr(modules.get(path), "weight_quant", None), "tensor_quant", None)
        m = module.in_grid.scale * module.scale.double() / out.scale
        if calls[path] > 1:
            found.left[path] = "its weights are used more than once"
        elif not isinstance(quantizer, Movable):
            found.left[path] = "its scale is no parameter of its own"
        elif (count := quantizer.scale.numel()) not in (1, len(m)) or (count == 1 and bool((m != m[0]).any())):
            found.left[path] = "its channels share a scale"
        else:
            wanted = fraction(m[:count])
            none = wanted.isnan()
            quantizer.move_scale(torch.where(none, 1.0, wanted / m[:count]))
            found.moved.append(path)
            if bool(none.any()):
                found.left[path] = f"{int(none.sum())} of {count} scales: their factor is too small"


def _rounded(reference: fx.GraphModule) -> Iterator[tuple[fx.Node, integer.Rounded, Grid]]:
    """The operators of a reference that round to codes, and the grids that they round to."""
    for node in reference.graph.nodes:
        module = reference.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, integer.Rounded) and module.out_grid is not None:
            yield node, module, module.out_grid
