"""The walk over a lowered graph: every node becomes operators of a .tflite file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from flatcompress.errors import UserError
from flatcompress.onnx_export.emit.writer import array, input_names, output_names
from flatcompress.onnx_export.litert.flat import Flat
from flatcompress.onnx_export.litert.values import Value, place, stored, stored_axes
from flatcompress.onnx_export.lower.integer import Grid

Emit = Callable[..., Any]
TRACED = 2  # samples of a lowered graph's shapes
RELU = 1  # ActivationFunctionType


def refuse(node: fx.Node | None, what: str) -> UserError:
    """The error for a node without a LiteRT form."""
    path = node.meta.get("path") if node is not None else None
    where = f"module {path!r}" if path else "the model's own forward"
    return UserError(f"{where}: {what} has no LiteRT form here, so profile 'litert' cannot write this model.")


class Writer:
    """Writes one lowered graph. ``modules``, ``functions``: what writes a kind of module, an operator of torch's.

    ``narrow``: weights of up to 4 bits stay 4 bits. ``layers``: a row for each that has weights, as it was stored.
    """

    def __init__(
        self, gm: fx.GraphModule, modules: dict[type, Emit], functions: dict[Any, Emit], narrow: bool = False
    ) -> None:
        self.gm, self.modules, self.functions, self.narrow = gm, modules, functions, narrow
        self.flat = Flat()
        self.env: dict[fx.Node, Any] = {}
        self.layers: list[dict[str, Any]] = []
        self._other: dict[tuple[Any, ...], Value] = {}

    # --- the walk ---------------------------------------------------------------------------------------------

    def write(self, metadata: dict[str, str], about: str) -> bytes:
        """The file's bytes; its metadata gain ``about``, what a program that runs it needs to know.

        UserError, naming the module, for what has no form in it.
        """
        names = input_names(self.gm)
        inputs: dict[str, int] = {}
        outputs: dict[str, int] = {}
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = self._input(node, names[node])
                inputs[names[node]] = self.env[node].tensor
            elif node.op == "get_attr":
                self.env[node] = getattr(self.gm, str(node.target))
            elif node.op == "output":
                outputs = self._outputs(node)
            else:
                self.env[node] = self._emitter(node)(self, node, *self._given(node))
        return self.flat.finish(inputs, outputs, {**metadata, about: json.dumps(self._about(names))})

    def _about(self, names: dict[fx.Node, str]) -> dict[str, Any]:
        orders = {name: self._order(self.env[node]) for node, name in names.items()}
        return {"inputs": orders, "layers": len(self.layers), "integer_layers": sum(r["integer"] for r in self.layers)}

    def _order(self, value: Value) -> str:
        """The order of an input's axes in the file."""
        if value.last:
            return "NHWC" if len(value.shape) == 4 else "N1TC"
        return {4: "NCHW", 3: "NTC"}.get(len(value.shape), "N..")

    def _emitter(self, node: fx.Node) -> Emit:
        if node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
            found = next((emit for kind, emit in self.modules.items() if isinstance(module, kind)), None)
            if found is None:
                raise refuse(node, f"a {type(module).__name__}")
            return found
        if node.target not in self.functions:
            raise refuse(node, f"the operator {node.target}")
        return self.functions[node.target]

    def _given(self, node: fx.Node) -> tuple[Any, ...]:
        return (self.gm.get_submodule(str(node.target)),) if node.op == "call_module" else ()

    def _input(self, node: fx.Node, name: str) -> Value:
        """Images and series are given channels last, as LiteRT's own are."""
        if node.meta["dtype"] != torch.float32:
            raise refuse(node, f"an input of type {node.meta['dtype']}")
        rank = len(node.meta["shape"])
        return self.make(node, name=name, last=rank in (3, 4) and self._is_image(node))

    def _is_image(self, node: fx.Node) -> bool:
        """Whether convolutions read it, behind its quantizer and paddings."""
        for user in node.users:
            if user.op == "call_module":
                module = self.gm.get_submodule(str(user.target))
                weight = getattr(module, "weight", None)
                if isinstance(weight, torch.Tensor):
                    return weight.dim() in (3, 4)
            if self._is_image(user):
                return True
        return False

    def _outputs(self, node: fx.Node) -> dict[str, int]:
        results = list(node.args[0]) if isinstance(node.args[0], tuple | list) else [node.args[0]]
        found: dict[str, int] = {}
        for result, name in zip(results, output_names(self.gm, len(results))):
            value = self.first(self.real(self.value(result, node)))
            if value.tensor in found.values() or not any(value.tensor in op.outputs for op in self.flat.operators):
                value = self.unary("RESHAPE", value, [self.shape_of(value)], "ReshapeOptions")
            self.flat.tensors[value.tensor].name = name
            found[name] = value.tensor
        return found

    # --- values -----------------------------------------------------------------------------------------------

    def value(self, node: Any, user: fx.Node) -> Value:
        """What a node made; a constant of the graph as one."""
        found = self.env.get(node) if isinstance(node, fx.Node) else None
        if isinstance(found, torch.Tensor):
            if not found.dtype.is_floating_point:
                raise refuse(user, f"a constant of type {found.dtype}")
            return self.fixed(array(found).astype(np.float32))
        if not isinstance(found, Value):
            raise refuse(user, f"the operand {node!r}")
        return found

    def fixed(self, values: np.ndarray) -> Value:
        """A real constant."""
        return Value(self.flat.constant(values), values.shape, frozenset())

    def make(
        self,
        node: fx.Node,
        last: bool = False,
        grid: Grid | None = None,
        name: str = "",
    ) -> Value:
        """The tensor of a node's result: codes of ``grid``, or real values."""
        axes = frozenset(node.meta.get("dynamic", {0}))
        sizes = [size // TRACED if axis in axes else size for axis, size in enumerate(node.meta["shape"])]
        if any(size % TRACED for axis, size in enumerate(node.meta["shape"]) if axis in axes):
            raise refuse(node, "a size that is no multiple of the batch")
        return self.like(Value(-1, tuple(sizes), axes, last), grid, name or node.name)

    def like(self, value: Value, grid: Grid | None, name: str = "", last: bool | None = None) -> Value:
        """A new tensor of a value's shape."""
        lies = value.last if last is None else last
        where = place(grid) if grid is not None else None
        tensor = self.flat.tensor(
            stored(value.shape, lies),
            "float32" if where is None else "int8",
            name or f"value_{len(self.flat.tensors)}",
            None if grid is None else grid.scale,
            0 if where is None else where.zero,
            stored_axes(value.open_axes, len(value.shape), lies),
        )
        return Value(tensor, value.shape, value.open_axes, lies, grid, 0 if where is None else where.shift)

    def rounded(self, out: Value, emit: Callable[[Value, int], None], fuses: bool = True, name: str = "") -> Value:
        """``emit(tensor, activation)`` writes codes into ``out``; limits that int8 does not keep come behind it."""
        assert out.grid is not None
        where = place(out.grid)
        relu = fuses and where.relu
        limits = [("MAXIMUM", where.floor)] if where.floor is not None and not relu else []
        limits += [("MINIMUM", where.ceiling)] if where.ceiling is not None else []
        made = [self.like(out, out.grid) for _ in limits] + [out]
        emit(made[0], RELU if relu else 0)
        for (kind, limit), source, result in zip(limits, made, made[1:]):
            constant = self.flat.constant(np.array([limit], np.int8), "", [out.grid.scale], where.zero)
            self.flat.op(kind, [source.tensor, constant], [result.tensor], 2, "MaximumMinimumOptions")
        return out

    def real(self, value: Value) -> Value:
        """The real values that codes stand for."""
        if value.grid is None:
            return value
        key = ("real", value.tensor)
        if key not in self._other:
            out = self.like(value, None)
            self.flat.op("DEQUANTIZE", [value.tensor], [out.tensor], 2)
            self._other[key] = out
        return self._other[key]

    def codes(self, value: Value, grid: Grid, name: str = "") -> Value:
        """Real values as codes; codes of another grid of the same scale as codes of this one."""
        out = self.like(value, grid, name)
        version = 1 if value.grid is None else 2
        return self.rounded(out, lambda to, _: self.flat.op("QUANTIZE", [value.tensor], [to.tensor], version), False)

    # --- order of axes ----------------------------------------------------------------------------------------

    def first(self, value: Value) -> Value:
        """The same with its axes in torch's order."""
        return value if not value.last else self._turned(value, False)

    def last(self, value: Value) -> Value:
        """The same with its channels last."""
        return value if value.last else self._turned(value, True)

    def _turned(self, value: Value, last: bool) -> Value:
        key = (last, value.tensor)
        if key not in self._other:
            rank, out = len(value.shape), self.moved(value, value.shape, value.open_axes, last)
            space = int(np.prod(value.shape[2:]))
            if space == 1 or value.shape[1] == 1:  # nothing changes its place
                self.flat.op("RESHAPE", [value.tensor, self.shape_of(out)], [out.tensor], 1, "ReshapeOptions")
            elif rank == 4:
                self.transpose(value, out, [0, 2, 3, 1] if last else [0, 3, 1, 2])
            else:
                flat = self._as_rows(value, out)
                self.transpose(*flat, [0, 2, 1])
                if last:
                    self.flat.op("RESHAPE", [flat[1].tensor, self.shape_of(out)], [out.tensor], 1, "ReshapeOptions")
            self._other[key] = out
        return self._other[key]

    def _as_rows(self, value: Value, out: Value) -> tuple[Value, Value]:
        """Source and result of the turn of a [B, C, T], both of rank 3 in the file."""
        batch, channels, length = value.shape
        turned = replace(value, shape=(batch, length, channels), last=False)
        if out.last:
            return value, self.moved(turned, turned.shape, value.open_axes, False)
        rows = self.moved(turned, turned.shape, value.open_axes, False)
        self.flat.op("RESHAPE", [value.tensor, self.shape_of(rows)], [rows.tensor], 1, "ReshapeOptions")
        return rows, out

    def moved(self, value: Value, shape: tuple[int, ...], axes: frozenset[int], last: bool) -> Value:
        """A new tensor of another shape that holds the same codes or real values."""
        made = self.like(Value(-1, shape, axes, last), value.grid)
        return made

    def transpose(self, source: Value, out: Value, order: list[int]) -> None:
        """Axes of the file in another order."""
        axes = self.flat.constant(np.array(order, np.int32))
        version = 1 if source.grid is None else 2
        self.flat.op("TRANSPOSE", [source.tensor, axes], [out.tensor], version, "TransposeOptions")

    def shape_of(self, value: Value) -> int:
        """The constant with a RESHAPE's shape; the one open size is found when the file runs."""
        axes = stored_axes(value.open_axes, len(value.shape), value.last)
        if len(axes) > 1:
            raise refuse(None, "a tensor with two sizes that follow the batch")
        sizes = [-1 if axis in axes else size for axis, size in enumerate(value.stored)]
        return self.flat.constant(np.array(sizes, np.int32))

    # --- operators --------------------------------------------------------------------------------------------

    def unary(self, name: str, value: Value, further: Any = (), options: str | None = None, **settings: Any) -> Value:
        """An operator whose result has its operand's shape, order and kind."""
        out = self.like(value, value.grid)
        self.flat.op(name, [value.tensor, *further], [out.tensor], 1, options, **settings)
        return out

    def same_order(self, a: Value, b: Value) -> tuple[Value, Value]:
        """Two operands that an operator joins element by element, in one order of axes."""
        if (a.last or b.last) and len(a.shape) == len(b.shape):
            return self.last(a), self.last(b)
        return self.first(a), self.first(b)
