"""A lowered graph as a `Program`, or a UserError that names the module which has no C form.

Only what is integers from end to end is taken: every output bit of the C is proved equal to onnxruntime's, and the
order in which onnxruntime adds floats (a softmax, a layer norm, a convolution with a real result) is not fixed.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from flatcompress.errors import UserError
from flatcompress.onnx_export.c import ir
from flatcompress.onnx_export.lower import integer

aten = torch.ops.aten
_RESHAPES = (aten.flatten.using_ints, aten.reshape.default, aten.view.default)
_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default)
_SIZES = (aten.sym_size.int, operator.add, operator.sub, operator.mul, operator.floordiv)


def read(reference: fx.GraphModule) -> ir.Program:
    """The program of a lowered graph (`lower`), its additions fused into convolutions where that is possible."""
    reader = _Reader(reference)
    for node in reference.graph.nodes:
        reader.visit(node)
    program = reader.program
    _fuse_adds(program)
    return program


def refuse(path: str, what: str) -> UserError:
    """The error for a module without a C form."""
    where = path or "the model's forward"
    return UserError(f"module {where!r}: {what} has no C form, so profile 'c' cannot write this model.")


class _Reader:
    def __init__(self, reference: fx.GraphModule) -> None:
        self.gm = reference
        self.env: dict[fx.Node, ir.Codes] = {}
        self.program = ir.Program((), ())

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.program.inputs = tuple(node.meta["shape"][1:])
        elif node.op == "call_module":
            self._module(node, self.gm.get_submodule(str(node.target)))
        elif node.op == "call_function":
            self._function(node)
        elif node.op == "output":
            self._output(node)

    def _add(self, node: fx.Node, step: ir.Step) -> None:
        self.program.steps.append(step)
        if step.out is not None:
            self.env[node] = step.out

    def _codes(self, node: fx.Node, grid: integer.Grid) -> ir.Codes:
        return ir.Codes(node.name, *_layout(node), grid)

    def _source(self, node: Any, user: fx.Node) -> ir.Codes:
        if node not in self.env:
            raise refuse(_path(user), f"arithmetic on real values ({_path(node)!r} puts them out)")
        return self.env[node]

    # --- modules ----------------------------------------------------------------------------------------------

    def _module(self, node: fx.Node, module: Any) -> None:
        kinds: dict[type, Any] = {
            integer.Quantize: self._quantize,
            integer.Dequantize: self._dequantize,
            integer.ClampCodes: self._clamp,
            integer.IntegerLayer: self._layer,
            integer.IntegerAdd: self._integer_add,
            integer.IntegerPool: self._pool,
        }
        make = kinds.get(type(module))
        if make is None:
            raise refuse(_path(node), _WHY.get(type(module).__name__, f"a {type(module).__name__} on real values"))
        make(node, module)

    def _quantize(self, node: fx.Node, module: integer.Quantize) -> None:
        if node.args[0].op != "placeholder":  # type: ignore[union-attr]
            raise refuse(_path(node.args[0]), "an operator on real values before a quantizer")
        self._add(node, ir.Quantize(_path(node), [], self._codes(node, module.grid)))

    def _dequantize(self, node: fx.Node, module: integer.Dequantize) -> None:
        for user in node.users:
            if user.op != "output":
                raise refuse(_path(user) or str(user.target), f"{_name(user)} on real values")
        self._add(node, ir.Dequantize(_path(node), [self._source(node.args[0], node)], None))

    def _clamp(self, node: fx.Node, module: integer.ClampCodes) -> None:
        source, out = self._source(node.args[0], node), self._codes(node, module.grid)
        codes = np.arange(source.high + 1) + source.base
        values = np.clip(codes, module.grid.low, module.grid.high) - out.base
        self._add(node, ir.Table(_path(node), [source], out, values.astype(np.uint8)))

    def _layer(self, node: fx.Node, module: integer.IntegerLayer) -> None:
        source = self._source(node.args[0], node)
        weight = module.weight.detach().cpu().numpy().astype(np.int64)
        rank, shape = weight.ndim - 2, node.meta["shape"]
        if rank > 2:
            raise refuse(_path(node), "a 3-D convolution")
        if rank == 0 and len(shape) != 2:
            raise refuse(_path(node), "a linear layer on tokens [B, T, C]")
        if module.out_grid is None:
            self._check_real(node, rank)
        out = None if module.out_grid is None else self._codes(node, module.out_grid)
        moved, window = _linear(weight, source) if rank == 0 else _convolution(weight, module.attributes)
        bias = np.zeros(weight.shape[0], np.int64) if module.bias is None else module.bias.numpy().astype(np.int64)
        scale = integer.scale32(module.in_grid.scale) * module.scale.detach().cpu()
        if out is not None:
            scale = scale / integer.scale32(out.grid.scale)
        height, width = (1, 1) if rank == 0 else _layout(node)[:2]
        self._add(
            node,
            ir.Conv(
                _path(node),
                [source],
                out,
                moved,
                bias,
                scale.numpy(),
                module.weight_bits,
                module.headroom,
                window,
                int(module.attributes.get("groups", 1)),
                height,
                width,
            ),
        )

    def _check_real(self, node: fx.Node, rank: int) -> None:
        """A real result is the model's output, or somebody computes on it."""
        for user in node.users:
            if user.op != "output":
                raise refuse(_path(user) or _path(node), f"{_name(user)} on real values")
        if rank:
            raise refuse(_path(node), "a convolution with a real result (onnxruntime computes it on floats)")

    def _integer_add(self, node: fx.Node, module: integer.IntegerAdd) -> None:
        a, b = (self._source(arg, node) for arg in node.args)
        if (a.height, a.width, a.channels) != (b.height, b.width, b.channels):
            raise refuse(_path(node), "an addition that repeats one operand over the other's shape")
        self._add(node, ir.Add(_path(node), [a, b], self._codes(node, module.out_grid)))

    def _pool(self, node: fx.Node, module: integer.IntegerPool) -> None:
        source, out = self._source(node.args[0], node), self._codes(node, module.out_grid)
        scales = integer.scale32(module.in_grid.scale), integer.scale32(module.out_grid.scale)
        factor = (scales[0] / (scales[1] * source.pixels)).numpy()
        self._add(node, ir.GlobalPool(_path(node), [source], out, np.float32(factor)))

    # --- functions --------------------------------------------------------------------------------------------

    def _function(self, node: fx.Node) -> None:
        target = node.target
        if target in _SIZES and "shape" not in node.meta:
            return
        if target in _RESHAPES or target in _SQUEEZES:
            self._reshape(node)
        elif target in (aten.max_pool2d.default, aten.max_pool1d.default):
            self._max_pool(node)
        elif target is aten.cat.default:
            self._cat(node)
        else:
            raise refuse(_path(node), _name(node))

    def _reshape(self, node: fx.Node) -> None:
        """A vector keeps the bytes where they are; whoever reads it knows their order by the source's shape."""
        source = self._source(node.args[0], node)
        shape = node.meta["shape"]
        real = [size for size in shape[1:] if size != 1]
        same = real == [size for size in node.args[0].meta["shape"][1:] if size != 1]  # type: ignore[union-attr]
        if len(shape) != 2 and not (same and _layout(node) == (source.height, source.width, source.channels)):
            raise refuse(_path(node), f"{_name(node)} that does more than flatten")
        self.env[node] = source

    def _max_pool(self, node: fx.Node) -> None:
        source = self._source(node.args[0], node)
        names = ("input", "kernel", "stride", "padding", "dilation", "ceil_mode")
        given = {**dict(zip(names, node.args)), **node.kwargs}
        rank = len(node.meta["shape"]) - 2
        kernel = _pair(given["kernel"], rank, 1)
        window = ir.Window(
            kernel,
            _pair(given.get("stride") or given["kernel"], rank, 1),
            _pair(given.get("dilation", 1), rank, 1),
            _pair(given.get("padding", 0), rank, 0),
        )
        self._add(node, ir.MaxPool(_path(node), [source], self._codes(node, source.grid), window))

    def _cat(self, node: fx.Node) -> None:
        sources = [self._source(arg, node) for arg in node.args[0]]  # type: ignore[union-attr]
        dim = int(node.args[1]) if len(node.args) > 1 else int(node.kwargs.get("dim", 0))  # type: ignore[arg-type]
        rank = len(node.meta["shape"])
        vectors = rank == 2 and any(source.pixels > 1 for source in sources)
        if dim % rank != 1 or vectors:
            raise refuse(_path(node), "a concatenation of anything but channels")
        self._add(node, ir.Concat(_path(node), sources, self._codes(node, sources[0].grid)))

    def _output(self, node: fx.Node) -> None:
        result = node.args[0]
        if not isinstance(result, fx.Node):
            raise refuse("", "more than one output")
        if not self.program.steps or self.program.steps[-1].out is not None:
            raise refuse(_path(result), "an output without a quantizer or an integer layer before it")
        self.program.outputs = tuple(result.meta["shape"][1:])


_WHY = {
    "WeightOnlyLayer": "a layer with integer weights and real inputs",
    "IntegerMatMul": "a product of two activations (attention)",
    "LayerNorm": "a layer norm, which onnxruntime computes on floats in an order of its own,",
    "GroupNorm": "a group norm, which onnxruntime computes on floats in an order of its own,",
}


def _path(node: Any) -> str:
    return str(node.meta.get("path") or "") if isinstance(node, fx.Node) else ""


def _name(node: fx.Node) -> str:
    """An operator or module for people."""
    if node.op == "call_module":
        return f"a {type(node.graph.owning_module.get_submodule(str(node.target))).__name__}"  # type: ignore[union-attr]
    parts = str(node.target).split(".")
    return f"the operator {parts[1] if len(parts) > 1 else parts[0]}"


def _layout(node: fx.Node) -> tuple[int, int, int]:
    """(height, width, channels) of [B, C], [B, C, L] or [B, C, H, W]."""
    sizes = list(node.meta["shape"][1:])
    if not 1 <= len(sizes) <= 3:
        raise refuse(_path(node), f"a tensor of {len(sizes) + 1} dimensions")
    channels, *spatial = sizes
    height, width = [1] * (2 - len(spatial)) + spatial
    return height, width, channels


def _pair(value: Any, rank: int, fill: int) -> tuple[int, int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    values = values * rank if len(values) == 1 else values
    first, second = [fill] * (2 - rank) + [int(v) for v in values]
    return first, second


def _linear(weight: np.ndarray, source: ir.Codes) -> tuple[np.ndarray, ir.Window]:
    """A matrix over a flattened [C, H, W] is a convolution with a kernel as large as its input."""
    shaped = weight.reshape(-1, source.channels, source.height, source.width)
    return shaped.transpose(0, 2, 3, 1), ir.Window((source.height, source.width))


def _convolution(weight: np.ndarray, attributes: dict[str, Any]) -> tuple[np.ndarray, ir.Window]:
    rank = weight.ndim - 2
    shaped = weight[:, :, None, :] if rank == 1 else weight
    kernel = (int(shaped.shape[2]), int(shaped.shape[3]))
    dilation = _pair(attributes["dilation"], rank, 1)
    pads = _begins(attributes["padding"], kernel, dilation, rank)
    extra = list(attributes.get("pads", ())) + [0] * 4  # torch: begin and end of the last dimension first
    top, left = pads[0] + (extra[2] if rank == 2 else 0), pads[1] + extra[0]
    window = ir.Window(kernel, _pair(attributes["stride"], rank, 1), dilation, (top, left))
    return shaped.transpose(0, 2, 3, 1), window


def _begins(padding: Any, kernel: tuple[int, int], dilation: tuple[int, int], rank: int) -> tuple[int, int]:
    if padding == "valid":
        return 0, 0
    if padding == "same":  # the odd pixel goes to the end
        return dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2
    return _pair(padding, rank, 0)


# --- fusing -------------------------------------------------------------------------------------------------------


def _fuse_adds(program: ir.Program) -> None:
    """``add(conv(x), y)`` becomes one step where the convolution is the last thing before the addition is ready."""
    for step in list(program.steps):
        if not isinstance(step, ir.Add) or step.sources[0] is step.sources[1]:
            continue
        order = {id(s.out): index for index, s in enumerate(program.steps)}
        late = max(step.sources, key=lambda tensor: order[id(tensor)])
        conv = program.steps[order[id(late)]]
        users = [s for s in program.steps if late in s.sources or (isinstance(s, ir.Conv) and _adds(s, late))]
        if not isinstance(conv, ir.Conv) or conv.add is not None or users != [step]:
            continue
        first = step.sources[0] is late
        other = step.sources[1 if first else 0]
        conv.add = ir.Fused(step.path, replace(late), other, first)
        conv.out = step.out
        conv.sources = [*conv.sources, other]
        program.steps.remove(step)


def _adds(conv: ir.Conv, tensor: ir.Codes) -> bool:
    return conv.add is not None and conv.add.other is tensor
