"""A lowered graph as a `Program`, or a UserError that names the module which has no C form.

Integers from end to end are taken, every output bit of which is proved equal to onnxruntime's, and between them the
arithmetic on real values that `real` knows. Reshapes and the like only say where elements lie (`layout`).
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from flatcompress.onnx_export.c import ir
from flatcompress.onnx_export.c.layout import Placed, affine, channels_last, in_order, inverse, loops, whole
from flatcompress.onnx_export.c.real import Chain, Decoded, Reals
from flatcompress.onnx_export.c.refusing import name_of, path_of, refuse
from flatcompress.onnx_export.lower import integer
from flatcompress.onnx_export.lower.prepare import MOVES

aten = torch.ops.aten
_SIZES = (aten.sym_size.int, operator.add, operator.sub, operator.mul, operator.floordiv)


def read(reference: fx.GraphModule) -> ir.Program:
    """The program of a lowered graph (`lower`), its additions fused into convolutions where that is possible."""
    reader = _Reader(reference)
    for node in reference.graph.nodes:
        reader.visit(node)
    program = reader.program
    _fuse_adds(program)
    return program


class _Reader(Reals):
    def __init__(self, reference: fx.GraphModule) -> None:
        self.gm = reference
        self.env: dict[fx.Node, Any] = {}
        self.program = ir.Program((), ())

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.program.inputs = tuple(node.meta["shape"][1:])
        elif node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            self.env[node] = getattr(self.gm.get_submodule(owner), name)
        elif node.op == "call_module":
            self._module(node, self.gm.get_submodule(str(node.target)))
        elif node.op == "call_function":
            self._function(node)
        elif node.op == "output":
            self._output(node)

    def _add(self, node: fx.Node, step: ir.Step, index: Tensor | None = None) -> None:
        """A step and where its result lies: channels last, unless ``index`` says otherwise."""
        self.program.steps.append(step)
        if step.out is not None:
            self.env[node] = Placed(step.out, channels_last(_shape(node)) if index is None else index)

    def _codes(self, node: fx.Node, grid: integer.Grid) -> ir.Codes:
        return ir.Codes(node.name, *_layout(_shape(node), node), grid)

    def _as(self, placed: Placed, index: Tensor, dims: tuple[int, int, int], user: fx.Node) -> ir.Codes:
        """The tensor of ``placed`` with its elements where ``index`` has them, moved where they lie otherwise."""
        tensor = placed.tensor
        if isinstance(tensor, ir.Real):
            raise refuse(path_of(user), f"{name_of(user)} of real values")
        places = placed.index.flatten()[torch.from_numpy(inverse(index))]
        if whole(placed) and torch.equal(places, torch.arange(len(places))):
            height, width, channels = dims
            same = dims == (tensor.height, tensor.width, tensor.channels)
            return tensor if same else replace(tensor, height=height, width=width, channels=channels)
        found = loops(places.numpy())
        if found is None:
            raise refuse(path_of(user), f"{name_of(user)} of elements in this order")
        first, nested = found
        moved = ir.Codes(f"move {len(self.program.steps)}", *dims, tensor.grid)
        self.program.steps.append(ir.Move(path_of(user), [tensor], moved, first, nested))
        return moved

    def _source(self, node: Any, user: fx.Node) -> ir.Codes:
        """An operand with its channels last."""
        placed = self._placed(node, user)
        shape = tuple(placed.index.shape[1:])
        return self._as(placed, channels_last(shape), _layout(shape, user), user)

    def _in_order(self, placed: Placed, user: fx.Node) -> Placed:
        shape = tuple(placed.index.shape[1:])
        rows = placed.index.numel() // shape[-1]
        return Placed(self._as(placed, in_order(shape), (1, rows, int(shape[-1])), user), in_order(shape))

    # --- modules ----------------------------------------------------------------------------------------------

    def _module(self, node: fx.Node, module: Any) -> None:
        kinds: dict[type, Any] = {
            integer.Quantize: self._quantize,
            integer.Dequantize: self._begin,
            integer.ClampCodes: self._clamp,
            integer.Table: self._table,
            integer.IntegerLayer: self._layer,
            integer.IntegerAdd: self._integer_add,
            integer.IntegerMul: self._gate,
            integer.IntegerPool: self._pool,
            integer.IntegerMatMul: self._matmul,
            nn.LayerNorm: self._layer_norm,
        }
        make = kinds.get(type(module))
        if make is None:
            raise refuse(path_of(node), _WHY.get(type(module).__name__, f"a {type(module).__name__} on real values"))
        make(node, module)

    def _quantize(self, node: fx.Node, module: integer.Quantize) -> None:
        if node.args[0].op != "placeholder":  # type: ignore[union-attr]
            self._quantized(node, module.grid)
            return
        self._add(node, ir.Quantize(path_of(node), [], self._codes(node, module.grid)))

    def _clamp(self, node: fx.Node, module: integer.ClampCodes) -> None:
        self._by_table(node, np.clip(np.arange(256), module.grid.low, module.grid.high), module.grid)

    def _table(self, node: fx.Node, module: integer.Table) -> None:
        self._by_table(node, module.codes.cpu().numpy().astype(np.int64), module.out_grid)

    def _by_table(self, node: fx.Node, codes: np.ndarray, grid: integer.Grid) -> None:
        """codes: [256], of the file's codes."""
        placed = self._placed(node.args[0], node)
        source = placed.tensor if whole(placed) else self._in_order(placed, node).tensor
        index = placed.index if whole(placed) else in_order(placed.index.shape[1:])
        assert isinstance(source, ir.Codes)
        out = ir.Codes(node.name, source.height, source.width, source.channels, grid)
        values = codes[np.arange(source.high + 1) + source.base] - out.base
        self._add(node, ir.Table(path_of(node), [source], out, values.astype(np.uint8)), index)

    def _layer(self, node: fx.Node, module: integer.IntegerLayer) -> None:
        weight = module.weight.detach().cpu().numpy().astype(np.int64)
        rank = weight.ndim - 2
        if rank > 2:
            raise refuse(path_of(node), "a 3-D convolution")
        if rank:
            source, index = self._source(node.args[0], node), channels_last(_shape(node))
            (moved, window), (height, width) = _convolution(weight, module.attributes), _layout(_shape(node), node)[:2]
        else:
            source, moved, index = self._linear(node, weight)
            window, height, width = ir.Window((1, 1)), 1, source.width
        dims = (height, width, len(weight))
        out = None if module.out_grid is None else ir.Codes(node.name, *dims, module.out_grid)
        bias = np.zeros(weight.shape[0], np.int64) if module.bias is None else module.bias.numpy().astype(np.int64)
        scale = integer.scale32(module.in_grid.scale) * module.scale.detach().cpu()
        if out is not None:
            scale = scale / integer.scale32(out.grid.scale)
        conv = ir.Conv(
            *(path_of(node), [source], out, moved, bias, scale.numpy(), module.weight_bits, module.headroom, window),
            int(module.attributes.get("groups", 1)), height, width,
        )  # fmt: skip
        if out is not None:
            self._add(node, conv, index)
            return
        if conv.depthwise:
            raise refuse(path_of(node), "a depthwise convolution with a real result")
        if module.bias is not None and rank == 0 and index.dim() > 2:  # the runtime adds it to real values
            conv.bias, conv.late = np.zeros_like(bias), (bias.astype(np.float32) * conv.scale).astype(np.float32)
        step = ir.Rows(path_of(node), [source], None, height * width, len(weight), conv)
        self._hold(node, Chain(step, index, dims, None))

    def _linear(self, node: fx.Node, weight: np.ndarray) -> tuple[ir.Codes, np.ndarray, Tensor]:
        """A matrix over the last dimension is a convolution of one pixel: its source, weights and result's places."""
        placed = self._placed(node.args[0], node)
        *lead, taps = placed.index.shape[1:]
        rows = placed.index.numel() // taps
        if rows == 1 and whole(placed) and isinstance(placed.tensor, ir.Codes):  # as the source lies, so do the weights
            weight = weight[:, inverse(placed.index)]
            source = replace(placed.tensor, height=1, width=1, channels=taps)
        else:
            source = self._as(placed, in_order((*lead, taps)), (1, rows, taps), node)
        return source, weight[:, None, None, :], in_order((*lead, len(weight)))

    def _integer_add(self, node: fx.Node, module: integer.IntegerAdd) -> None:
        first, second = (self._placed(arg, node) for arg in node.args)
        if first.index.shape != second.index.shape:
            raise refuse(path_of(node), "an addition that repeats one operand over the other's shape")
        shape = tuple(first.index.shape[1:])
        index, dims = channels_last(shape), _layout(shape, node)
        if whole(first):
            index, dims = first.index, (first.tensor.height, first.tensor.width, first.tensor.channels)
        a, b = (self._as(placed, index, dims, node) for placed in (first, second))
        self._add(node, ir.Add(path_of(node), [a, b], ir.Codes(node.name, *dims, module.out_grid)), index)

    def _gate(self, node: fx.Node, module: integer.IntegerMul) -> None:
        placed = [self._placed(arg, node) for arg in node.args]
        shape = torch.broadcast_shapes(*(one.index.shape for one in placed))
        dims = _layout(tuple(shape[1:]), node)
        views = []
        for one in placed:
            by_pixel = one.index.expand(shape).movedim(1, -1).reshape(-1, dims[2])
            found = affine(by_pixel)
            if found is None or found[0] or isinstance(one.tensor, ir.Real):
                raise refuse(path_of(node), "a product that repeats one operand in this way")
            views.append((found[1][0], found[1][1]))
        scales = [integer.scale32(grid.scale) for grid in (module.first, module.second, module.out_grid)]
        factor = np.float32(scales[0] * scales[1] / scales[2])
        out = ir.Codes(node.name, *dims, module.out_grid)
        step = ir.Gate(path_of(node), [one.tensor for one in placed], out, factor, (views[0], views[1]))
        self._add(node, step, channels_last(tuple(shape[1:])))

    def _pool(self, node: fx.Node, module: integer.IntegerPool) -> None:
        source, out = self._source(node.args[0], node), self._codes(node, module.out_grid)
        scales = integer.scale32(module.in_grid.scale), integer.scale32(module.out_grid.scale)
        factor = (scales[0] / (scales[1] * source.pixels)).numpy()
        self._add(node, ir.GlobalPool(path_of(node), [source], out, np.float32(factor)))

    # --- functions --------------------------------------------------------------------------------------------

    def _function(self, node: fx.Node) -> None:
        target = node.target
        if target in _SIZES and "shape" not in node.meta:
            self._size(node)
        elif target in (aten.max_pool2d.default, aten.max_pool1d.default):
            self._max_pool(node)
        elif target is aten.cat.default:
            self._cat(node)
        elif target in MOVES:
            self._move(node)
        elif not self._real_function(node):
            raise refuse(path_of(node), name_of(node))

    def _size(self, node: fx.Node) -> None:
        """Sizes of one sample."""
        if node.target is not aten.sym_size.int:
            self.env[node] = node.target(*(self.env[a] if isinstance(a, fx.Node) else a for a in node.args))  # type: ignore[operator]
            return
        of, axis = node.args
        held = self.env.get(of)  # type: ignore[arg-type]
        held = held.codes if isinstance(held, Decoded) else held
        shape = (1, *of.meta["shape"][1:]) if held is None else held.index.shape  # type: ignore[union-attr]
        self.env[node] = int(shape[axis])  # type: ignore[index]

    def _move(self, node: fx.Node) -> None:
        """Anything that gives some of the elements it gets: done on their places."""
        first: Any = node.args[0]
        if isinstance(self.env.get(first), Tensor | list):
            source, values = None, self.env[first]
        else:
            source = self._placed(first, node)
            values = source.index

        def known(arg: fx.Node) -> Any:
            return values if arg is first else self.env[arg]

        if source is None and node.target is operator.getitem and isinstance(values, list):
            self.env[node] = values[node.args[1]]  # type: ignore[index]
            return
        try:
            made = node.target(*fx.map_arg(node.args, known), **fx.map_arg(node.kwargs, known))  # type: ignore[operator]
        except (RuntimeError, KeyError):
            raise refuse(path_of(node), name_of(node)) from None
        if source is None:
            self.env[node] = made
        elif isinstance(made, Tensor):
            self.env[node] = Placed(source.tensor, made)
        else:
            self.env[node] = [Placed(source.tensor, one) for one in made]

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
        self._add(node, ir.MaxPool(path_of(node), [source], self._codes(node, source.grid), window))

    def _cat(self, node: fx.Node) -> None:
        given: Any = node.args[0]
        dim = int(node.args[1]) if len(node.args) > 1 else int(node.kwargs.get("dim", 0))  # type: ignore[arg-type]
        rank = len(node.meta["shape"])
        placed = [self._placed(arg, node) for arg in given]
        if dim % rank != 1 or any(isinstance(one.tensor, ir.Real) for one in placed):
            raise refuse(path_of(node), "a concatenation of anything but channels")
        sources = [self._source(arg, node) for arg in given]
        self._add(node, ir.Concat(path_of(node), sources, self._codes(node, sources[0].grid)))

    def _output(self, node: fx.Node) -> None:
        result = node.args[0]
        if not isinstance(result, fx.Node):
            raise refuse("", "more than one output")
        self.program.outputs = tuple(result.meta["shape"][1:])
        held = self.env.get(result)
        if isinstance(held, Decoded):
            shape = tuple(held.codes.index.shape[1:])
            source = self._as(held.codes, channels_last(shape), _layout(shape, result), result)
            self.program.steps.append(ir.Dequantize(path_of(result), [source], None))
            return
        if isinstance(held, Placed) and isinstance(held.tensor, ir.Codes):
            raise refuse(path_of(result), "an output of codes")
        chain = self._chain(result, result)
        shape = tuple(chain.index.shape[1:])
        chain.step.planes = not torch.equal(chain.index, in_order(shape))
        if chain.step.planes and not torch.equal(chain.index, channels_last(shape)):
            raise refuse(path_of(result), "an output of real values in another order")
        step = chain.step
        plain = not (step.changes or step.mean or step.planes)
        if isinstance(step.begin, ir.Conv) and plain:
            self.program.steps.append(step.begin)
        else:
            self._finish(chain, None)


_WHY = {
    "WeightOnlyLayer": "a layer with integer weights and real inputs",
    "GroupNorm": "a group norm, which onnxruntime computes on floats in an order of its own,",
}


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Of one sample."""
    return tuple(node.meta["shape"][1:])


def _layout(shape: tuple[int, ...], user: fx.Node) -> tuple[int, int, int]:
    """(height, width, channels) of [C], [C, L] or [C, H, W]."""
    if not 1 <= len(shape) <= 3:
        raise refuse(path_of(user), f"a tensor of {len(shape) + 1} dimensions")
    channels, *spatial = shape
    height, width = [1] * (2 - len(spatial)) + spatial
    return height, width, channels


def _pair(value: Any, rank: int, fill: int) -> tuple[int, int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    values = values * rank if len(values) == 1 else values
    first, second = [fill] * (2 - rank) + [int(v) for v in values]
    return first, second


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
        if not isinstance(step, ir.Add) or step.sources[0].name == step.sources[1].name:
            continue
        order = {s.out.name: index for index, s in enumerate(program.steps) if s.out is not None}
        late = max(step.sources, key=lambda tensor: order[tensor.name])
        conv = program.steps[order[late.name]]
        users = [s for s in program.steps if any(source.name == late.name for source in s.sources)]
        if not isinstance(conv, ir.Conv) or conv.add is not None or users != [step]:
            continue
        first = step.sources[0] is late
        other = step.sources[1 if first else 0]
        conv.add = ir.Fused(step.path, replace(late), other, first)
        conv.out = step.out
        conv.sources = [*conv.sources, other]
        program.steps.remove(step)
