"""Emitters for LSTM, GRU and RNN as ONNX's own nodes, one per layer, on floats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from flatcompress.errors import UserError
from flatcompress.onnx_export.emit.writer import FunctionEmitter, Writer, array
from flatcompress.onnx_export.lower.lowering import function_path

aten = torch.ops.aten
_ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.full.default}


@dataclass(frozen=True)
class _Kind:
    """``order``: torch's gates in ONNX's order (LSTM: i f g o -> i o f c; GRU: r z n -> z r h)."""

    operator: str
    order: tuple[int, ...]
    attributes: dict[str, Any]

    @property
    def states(self) -> int:
        return 2 if self.operator == "LSTM" else 1


_LSTM = _Kind("LSTM", (0, 3, 1, 2), {})
_GRU = _Kind("GRU", (1, 0, 2), {"linear_before_reset": 1})
_TANH = _Kind("RNN", (0,), {"activations": ["Tanh"]})
_RELU = _Kind("RNN", (0,), {"activations": ["Relu"]})


def _emitter(kind: _Kind) -> FunctionEmitter:
    def emit(
        w: Writer,
        node: fx.Node,
        x: fx.Node,
        hx: Any,
        parameters: Sequence[fx.Node],
        has_biases: bool,
        layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> list[str]:
        states = list(hx) if isinstance(hx, list | tuple) else [hx]
        stack = _Stack(w, node, kind, [array(w.value_of(p)) for p in parameters], has_biases, 1 + int(bidirectional))
        return stack.run(w.tensor(x), states, layers, batch_first)

    return emit


class _Stack:
    """The layers of one call. Results as torch gives them: the sequence, then the final state (and the cell's)."""

    def __init__(
        self, w: Writer, node: fx.Node, kind: _Kind, weights: list[NDArray[Any]], biases: bool, directions: int
    ) -> None:
        self.w, self.node, self.kind = w, node, kind
        self.weights, self.biases, self.directions = weights, biases, directions
        self.each = 4 if biases else 2
        if len(weights) % self.each:
            raise UserError("a projected LSTM (proj_size) has no ONNX form.")

    def run(self, x: str, states: list[Any], layers: int, batch_first: bool) -> list[str]:
        b = self.w.builder
        if batch_first:
            x = b.op("Transpose", [x], perm=[1, 0, 2])
        finals: list[list[str]] = [[] for _ in range(self.kind.states)]
        for layer in range(layers):
            x, last = self._layer(x, layer, [self._initial(state, layer, layers) for state in states])
            for kept, value in zip(finals, last):
                kept.append(value)
        if batch_first:
            x = b.op("Transpose", [x], perm=[1, 0, 2])
        return [x, *(b.op("Concat", kept, axis=0) if layers > 1 else kept[0] for kept in finals)]

    def _initial(self, state: Any, layer: int, layers: int) -> str:
        """The rows of an initial state that belong to a layer; nothing where it is zero, as ONNX assumes it."""
        if not isinstance(state, fx.Node) or _is_zero(self.w, state):
            return ""
        name, b, n = self.w.tensor(state), self.w.builder, self.directions
        if layers == 1:
            return name
        return b.op("Slice", [name, b.ints([layer * n]), b.ints([(layer + 1) * n]), b.ints([0])])

    def _layer(self, x: str, layer: int, initial: list[str]) -> tuple[str, list[str]]:
        b, n, kind = self.w.builder, self.directions, self.kind
        parts = [self._direction(layer * n + d) for d in range(n)]
        inputs, recurrent, bias = (np.stack([p[i] for p in parts]) for i in range(3))
        given: dict[str, Any] = {"hidden_size": recurrent.shape[-1], **kind.attributes}
        if n == 2:
            given["direction"] = "bidirectional"
            if "activations" in given:
                given["activations"] = given["activations"] * 2
        constants = [self._constant(inputs), self._constant(recurrent), self._constant(bias)]
        fed = [x, *constants, "", *initial]
        while not fed[-1]:
            fed.pop()
        made = b.ops(kind.operator, fed, name=function_path(self.node), outputs=1 + kind.states, **given)
        joined = b.op("Reshape", [b.op("Transpose", [made[0]], perm=[0, 2, 1, 3]), b.ints([0, 0, -1])])
        return joined, made[1:]

    def _direction(self, index: int) -> tuple[NDArray[Any], ...]:
        own = self.weights[index * self.each : (index + 1) * self.each]
        rows = own[1].shape[1]
        if own[0].shape[0] != rows * len(self.kind.order):
            raise UserError("a projected LSTM (proj_size) has no ONNX form.")
        biases = own[2:] if self.biases else [np.zeros(own[0].shape[0], own[0].dtype)] * 2
        return self._ordered(own[0]), self._ordered(own[1]), np.concatenate([self._ordered(v) for v in biases])

    def _ordered(self, rows: NDArray[Any]) -> NDArray[Any]:
        gates = np.split(rows, len(self.kind.order))
        return np.concatenate([gates[i] for i in self.kind.order])

    def _constant(self, values: NDArray[Any]) -> str:
        return self.w.builder.constant(np.ascontiguousarray(values).astype(self.w.profile.floats))


def _is_zero(w: Writer, state: fx.Node) -> bool:
    if state.op == "get_attr":
        return not bool(w.value_of(state).any().item())
    return state.target in _ZEROS and bool(state.target is not aten.full.default or state.args[1] == 0)


RECURRENT: dict[Any, FunctionEmitter] = {
    aten.lstm.input: _emitter(_LSTM),
    aten.gru.input: _emitter(_GRU),
    aten.rnn_tanh.input: _emitter(_TANH),
    aten.rnn_relu.input: _emitter(_RELU),
}
