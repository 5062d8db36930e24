"""Pieces of C that every step is written with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flatcompress.onnx_export.c import ir, requantize


@dataclass
class Sources:
    """``weights``: const arrays. ``constants``: descriptors. ``calls``: the body of run. ``uses``: kernel parts."""

    name: str
    weights: list[str] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    uses: set[str] = field(default_factory=set)
    parameter_bytes: int = 0
    weight_bytes: int = 0

    def array(self, kind: str, name: str, values: Iterable[Any]) -> str:
        """A const array; returns its name."""
        values = list(values)
        self.weights.append(f"static const {kind} {name}[{len(values)}] = {{\n{lines_of(values)}\n}};")
        return name

    def step(self, kernel: str, kind: str, name: str, fields: dict[str, Any], path: str) -> None:
        """A step that one descriptor says all of: the descriptor ``name``, and the call of its kernel."""
        self.constants.append(struct(kind, name, fields))
        self.calls.append(f"{kernel}(&{name}, bytes); /* {comment(path)} */")


def lines_of(values: Sequence[Any]) -> str:
    rows, row = [], "   "
    for value in values:
        text = f" {value},"
        if len(row) + len(text) > 118:
            rows.append(row)
            row = "   "
        row += text
    return "\n".join([*rows, row])


def packed_bits(source: ir.Tensor | None, target: ir.Tensor | None, other: ir.Tensor | None = None) -> int:
    """The field ``packed`` of a step, as common.h has its bits."""
    tensors = (source, target, other)
    return sum(1 << bit for bit, held in enumerate(tensors) if isinstance(held, ir.Codes) and held.packed)


def number(value: float | np.floating) -> str:
    """A float32 in C, with every bit."""
    return float(np.float32(value)).hex() + "f"


def struct(kind: str, name: str, fields: dict[str, Any]) -> str:
    body = ",\n".join(f"    .{key} = {value}" for key, value in fields.items())
    return f"static const {kind} {name} = {{\n{body},\n}};"


def window_fields(window: ir.Window) -> dict[str, int]:
    pairs = {"kernel": window.kernel, "stride": window.stride, "dilation": window.dilation}
    sides = {f"{name}_{side}": pair[index] for name, pair in pairs.items() for index, side in enumerate("hw")}
    return {**sides, "pad_t": window.pads[0], "pad_l": window.pads[1]}


def offset(rule: requantize.Rule, zero: int) -> int:
    """The rule's offset with the zero point in it."""
    return rule.offset + (zero << rule.shift)


def comment(path: str) -> str:
    return path.replace("*/", "* /").replace("\\", "/")
