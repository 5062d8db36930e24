"""From a traced, quantized model to its `reference`: a plain torch graph that computes what the exported file does.

Every weighted layer becomes integers and scales with its BatchNorm folded in, every quantizer an explicit grid, and
a value is either real or codes on a grid; whoever needs a real value gets a Dequantize. The writer turns this graph
into ONNX node by node, and the certificate compares the two.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from flatcompress import graph as graphs
from flatcompress.errors import UserError
from flatcompress.graph.interface import KEY, arguments, interface_of
from flatcompress.graph.rewrite import traced_shape
from flatcompress.modules import modes_kept, pads_with_zeros
from flatcompress.onnx_export.lower import integer, tables, transposed
from flatcompress.onnx_export.lower.fold import Folded, fold, fold_float, integer_bias
from flatcompress.onnx_export.lower.integer import Grid
from flatcompress.onnx_export.lower.prepare import (
    MOVES,
    aten,
    clamp_bounds,
    is_quantizer,
    is_weighted,
    module_of,
    prepare,
)
from flatcompress.onnx_export.lower.shapes import note_shapes
from flatcompress.onnx_export.lower.transposed import SubPixel

_KEPT = (
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_POOLS = (aten.adaptive_avg_pool2d.default, aten.mean.dim)
QUANTIZED = "quantized"
_MATMULS = (aten.matmul.default, aten.bmm.default, aten.mm.default)


@dataclass(frozen=True)
class Value:
    """A node of the lowered graph and the grid of its codes; real (or no tensor at all) without one."""

    node: fx.Node
    grid: Grid | None = None


def lower(model: nn.Module, example_input: Any) -> fx.GraphModule:
    """The reference of ``model`` in eval mode, for any batch size. ``example_input``: a tensor [B, ...], a tuple of
    arguments or a dictionary of them; the reference takes their tensors in order and returns one tensor or a tuple.
    Its ``meta[QUANTIZED]``: {activation quantizer: (the node that has its codes, their grid)}.

    UserError when the model cannot be traced, or holds a layer or quantizer that has no lowered form.
    """
    traced = graphs.trace(model, example_input)
    interface = interface_of(traced.graph)
    with modes_kept(model):
        prepare(traced)
        lowered = _Lowering(traced).run()
    lowered.meta[KEY] = interface
    note_shapes(lowered, interface.inputs(*arguments(example_input)))
    return lowered


class _Lowering:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.env: dict[fx.Node, Value] = {}
        self.reals: dict[fx.Node, fx.Node] = {}

    def run(self) -> fx.GraphModule:
        for node in self.gm.graph.nodes:
            getattr(self, f"_{node.op}")(node)
        lowered = fx.GraphModule(self.root, self.graph)
        lowered.graph.eliminate_dead_code()
        lowered.delete_all_unused_submodules()
        lowered.recompile()
        lowered.meta[QUANTIZED] = self._where_quantized(set(lowered.graph.nodes))
        return lowered.eval()

    def _where_quantized(self, present: set[fx.Node]) -> dict[str, tuple[str, Grid]]:
        found = {}
        for node in self.gm.graph.nodes:
            at_home = is_quantizer(self.gm, node) and not node.meta.get("moved")
            target, value = str(node.target) if at_home else node.meta.get("quantized_by"), self.env.get(node)
            if target and value is not None and value.grid is not None and value.node in present:
                found[target] = (value.node.name, value.grid)
        return found

    # --- one method per kind of fx node -----------------------------------------------------------------------

    def _placeholder(self, node: fx.Node) -> None:
        self._set(node, self.graph.placeholder(node.name))

    def _get_attr(self, node: fx.Node) -> None:
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(self.gm.get_submodule(owner), name)
        flat = str(node.target).replace(".", "_")
        self.root.register_buffer(flat, value.detach().cpu().clone())
        self._set(node, self.graph.get_attr(flat))

    def _output(self, node: fx.Node) -> None:
        self.graph.output(fx.map_arg(node.args[0], self._real))

    def _call_module(self, node: fx.Node) -> None:
        module = module_of(self.gm, node)
        if is_quantizer(self.gm, node):
            self._quantize(node)
        elif is_weighted(self.gm, node):
            self._weighted(node, module)
        elif isinstance(module, _KEPT):
            self._set(node, self._call(node, copy.deepcopy(module).cpu().float(), self._real(node.args[0])))
        else:
            raise UserError(f"module {node.target!r}: a {type(module).__name__} has no exported form.")

    def _call_function(self, node: fx.Node) -> None:
        first = self.env.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if first is not None and first.grid is not None and self._on_codes(node, first):
            return
        if node.target is aten.add.Tensor and self._integer_add(node):
            return
        if node.target is aten.mul.Tensor and self._integer_mul(node):
            return
        if node.target in _MATMULS and self._integer_matmul(node):
            return
        if node.target is aten.cat.default and self._cat(node):
            return
        args = fx.map_arg(node.args, self._real)
        self._set(node, self._function(node, args, fx.map_arg(node.kwargs, self._real)))

    # --- values -----------------------------------------------------------------------------------------------

    def _set(self, old: fx.Node, new: fx.Node, grid: Grid | None = None) -> None:
        new.meta["path"] = new.meta.get("path") or old.meta.get("path", "")
        self.env[old] = Value(new, grid)

    def _real(self, node: Any) -> Any:
        """The lowered node with real values for a traced node."""
        if not isinstance(node, fx.Node):
            return node
        value = self.env[node]
        if value.grid is None:
            return value.node
        if value.node not in self.reals:
            made = self._module(f"dequantize_{value.node.name}", integer.Dequantize(value.grid), (value.node,))
            self.reals[value.node] = made
        return self.reals[value.node]

    def _module(self, name: str, module: nn.Module, args: tuple[fx.Node, ...], path: str = "") -> fx.Node:
        unique, count = name, 1
        while hasattr(self.root, unique):
            unique, count = f"{name}_{count}", count + 1
        self.root.add_module(unique, module)
        made = self.graph.call_module(unique, args)
        made.meta["path"] = path
        return made

    def _call(self, node: fx.Node, module: nn.Module, *args: fx.Node) -> fx.Node:
        """Call ``module`` in place of ``node``, under a name made of the module path."""
        path = str(node.target) if node.op == "call_module" else function_path(node)
        return self._module(path.replace(".", "_"), module, args, path)

    def _function(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        made = self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        made.meta["path"] = node.meta.get("path", "")
        return made

    def _grid(self, quantizer: fx.Node) -> Grid:
        spec = module_of(self.gm, quantizer).activation_spec()  # type: ignore[union-attr, operator]
        grid = Grid.of(spec, f"quantizer {quantizer.target!r}")
        return grid.clamped(quantizer.meta.get("low", float("-inf")), quantizer.meta.get("high", float("inf")))

    def _sink(self, node: fx.Node) -> Grid | None:
        """The grid that everything after ``node`` sees: its only user is a quantizer."""
        users = list(node.users)
        return self._grid(users[0]) if len(users) == 1 and is_quantizer(self.gm, users[0]) else None

    # --- layers -----------------------------------------------------------------------------------------------

    def _quantize(self, node: fx.Node) -> None:
        grid = self._grid(node)
        value = self.env[node.args[0]]  # type: ignore[index]
        if value.grid == grid:
            self.env[node] = value
            return
        root = tables.root_of(node.args[0], lambda n: self.env[n].grid is not None)  # type: ignore[arg-type]
        if root is not None:
            codes = self.env[root]
            table = tables.tabulate(self.gm, root, node.args[0], codes.grid, grid)  # type: ignore[arg-type]
            self._set(node, self._call(node.args[0], table, codes.node), grid)  # type: ignore[arg-type]
            return
        self._set(node, self._call(node, integer.Quantize(grid), self._real(node.args[0])), grid)

    def _weighted(self, node: fx.Node, module: Any) -> None:
        value = self.env[node.args[0]]  # type: ignore[index]
        norms = node.meta.get("norms", [])
        if not hasattr(module, "weight_spec"):
            self._set(node, self._call(node, _float_layer(module, norms), self._padded(node, module)))
            return
        spec = module.weight_spec()
        bias = module.bias
        rows, scales = graphs.rows(spec, getattr(module, "groups", 1))
        folded = fold(rows.detach().cpu(), scales.cpu(), None if bias is None else bias.cpu(), norms)
        attributes = conv_attributes(module) if spec.values.dim() > 2 else {}
        pixels = None
        if spec.axis == 1:
            folded, pixels = _as_plain(folded, module)
            attributes = {"stride": 1, "padding": 0, "dilation": pixels.dilations, "groups": module.groups}
            attributes["pads"] = list(pixels.pads)
        elif "pads" in node.meta:
            attributes["pads"] = node.meta["pads"]
        if value.grid is None or not pads_with_zeros(module):
            real_bias = None if folded.bias is None else folded.bias.float()
            values, scale = _within_int8(folded.values), folded.scale.float()
            layer: nn.Module = integer.WeightOnlyLayer(values, scale, real_bias, spec.bits, attributes)
            self._set(node, self._side_by_side(self._call(node, layer, self._padded(node, module)), pixels))
            return
        shift = graphs.headroom(folded.values, spec.bits)
        folded, whole = integer_bias(folded, value.grid.scale, shift)
        out = self._sink(node)
        layer = integer.IntegerLayer(
            _within_int8(folded.values), folded.scale, whole, value.grid, out, spec.bits, shift, attributes
        )
        self._set(node, self._side_by_side(self._call(node, layer, value.node), pixels), out)

    def _side_by_side(self, made: fx.Node, pixels: SubPixel | None) -> fx.Node:
        """[B, C * prod(strides), *size] -> [B, C, *(size * strides)] of what was a transposed convolution, ends cut."""
        if pixels is None:
            return made
        path, rank = made.meta["path"], len(pixels.strides)

        def then(target: Any, *args: Any) -> None:
            nonlocal made
            made = self.graph.call_function(target, (made, *args))
            made.meta["path"] = path

        if rank == 2 and pixels.strides[0] == pixels.strides[1] > 1:
            then(aten.pixel_shuffle.default, pixels.strides[0])
        elif any(stride > 1 for stride in pixels.strides):
            then(aten.unflatten.int, 1, [-1, *pixels.strides])
            then(aten.permute.default, [0, 1, *(a for i in range(rank) for a in (2 + rank + i, 2 + i))])
            for axis in range(rank):
                then(aten.flatten.using_ints, 2 + axis, 3 + axis)
        for axis, (begin, end) in enumerate(pixels.cuts):
            if begin or end:
                then(aten.slice.Tensor, 2 + axis, begin, -end if end else (1 << 63) - 1)
        return made

    def _padded(self, node: fx.Node, module: Any) -> fx.Node:
        """The real input of a layer, padded by itself where the layer does not pad with zeros."""
        real = self._real(node.args[0])
        if pads_with_zeros(module):
            return real
        mode = module.padding_mode
        pads = list(module._reversed_padding_repeated_twice)
        made = self.graph.call_function(aten.pad.default, (real, pads, mode))
        made.meta["path"] = str(node.target)
        return made

    # --- functions --------------------------------------------------------------------------------------------

    def _on_codes(self, node: fx.Node, first: Value) -> bool:
        """Do ``node`` on the codes of its first argument where that is the same thing."""
        assert first.grid is not None
        if node.target is aten.sym_size.int:
            self._set(node, self._function(node, (first.node, *node.args[1:]), node.kwargs))
            return True
        if node.target in MOVES:
            args = (first.node, *fx.map_arg(tuple(node.args[1:]), self._real))
            self._set(node, self._function(node, args, fx.map_arg(node.kwargs, self._real)), first.grid)
            return True
        bounds = clamp_bounds(node)
        if bounds is not None:
            grid = first.grid.clamped(*bounds)
            made = first.node if grid == first.grid else self._call(node, integer.ClampCodes(grid), first.node)
            self._set(node, made, grid)
            return True
        return node.target in _POOLS and self._integer_pool(node, first)

    def _integer_add(self, node: fx.Node) -> bool:
        return self._on_two(node, integer.IntegerAdd)

    def _integer_mul(self, node: fx.Node) -> bool:
        return self._on_two(node, integer.IntegerMul)

    def _on_two(self, node: fx.Node, kind: type[integer.IntegerAdd | integer.IntegerMul]) -> bool:
        """An operator on two tensors of codes whose result is quantized."""
        values = [self.env[a] for a in node.args[:2] if isinstance(a, fx.Node) and a in self.env]
        out = self._sink(node)
        if len(values) != 2 or out is None or node.kwargs or any(v.grid is None for v in values):
            return False
        a, b = values
        self._set(node, self._call(node, kind(a.grid, b.grid, out), a.node, b.node), out)  # type: ignore[arg-type]
        return True

    def _integer_matmul(self, node: fx.Node) -> bool:
        a, b = (self.env[n] for n in node.args[:2])  # type: ignore[index]
        if a.grid is None or b.grid is None:
            return False
        out = self._sink(node)
        self._set(node, self._call(node, integer.IntegerMatMul(a.grid, b.grid, out), a.node, b.node), out)
        return True

    def _integer_pool(self, node: fx.Node, first: Value) -> bool:
        """Global pooling whose result is quantized; anything else is computed on real values."""
        out = self._sink(node)
        if out is None or not is_global_pool(node) or first.grid is None:
            return False
        made = self._call(node, integer.IntegerPool(first.grid, out), first.node)
        if node.target is aten.mean.dim and not _keeps_dims(node):
            made = self.graph.call_function(aten.flatten.using_ints, (made, 1))
        self._set(node, made, out)
        return True

    def _cat(self, node: fx.Node) -> bool:
        values = [self.env[n] for n in node.args[0]]  # type: ignore[union-attr, index]
        grids = {value.grid for value in values}
        if len(grids) != 1 or None in grids:
            return False
        made = self._function(node, ([value.node for value in values], *node.args[1:]), node.kwargs)
        self._set(node, made, values[0].grid)
        return True


def function_path(node: fx.Node) -> str:
    """A readable name for an operator: the module it was written in, and its own."""
    return f"{node.meta.get('path', '')}.{str(node.target).split('.')[1]}".lstrip(".")


def is_global_pool(node: fx.Node) -> bool:
    """Whether an average pool or mean covers exactly height and width of [B, C, H, W]."""
    if node.target is aten.adaptive_avg_pool2d.default:
        return node.args[1] in (1, [1, 1], (1, 1), [1])
    rank = len(traced_shape(node.args[0]))
    dims = node.args[1] if len(node.args) > 1 else None
    return rank == 4 and isinstance(dims, list | tuple) and sorted(d % 4 for d in dims) == [2, 3]


def is_global_pool_shape(x: fx.Node, dim: Any) -> bool:
    """Whether ``dim`` are height and width of a lowered [B, C, H, W]."""
    return len(x.meta["shape"]) == 4 and isinstance(dim, list | tuple) and sorted(d % 4 for d in dim) == [2, 3]


def _keeps_dims(node: fx.Node) -> bool:
    return bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))


def conv_attributes(module: Any) -> dict[str, Any]:
    """stride, padding, dilation and groups of a convolution, as the functional forms take them."""
    padding = module.padding if pads_with_zeros(module) else 0
    return {"stride": module.stride, "padding": padding, "dilation": module.dilation, "groups": module.groups}


def _as_plain(folded: Folded, module: Any) -> tuple[Folded, SubPixel]:
    """A folded transposed convolution as a plain one with a channel per position inside a stride."""
    values, pixels = transposed.plain(folded.values, module)
    each = math.prod(pixels.strides)
    bias = None if folded.bias is None else folded.bias.repeat_interleave(each)
    return Folded(values, folded.scale.repeat_interleave(each), bias), pixels


def _float_layer(module: Any, norms: list[nn.Module]) -> nn.Module:
    """A copy of a float layer with its BatchNorms folded in; it pads nothing where `_padded` does it."""
    layer = copy.deepcopy(module).cpu().float()
    weight, bias = fold_float(layer.weight, layer.bias, norms)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    if not pads_with_zeros(layer):
        layer.padding_mode, layer.padding = "zeros", (0,) * len(layer.kernel_size)
    return layer


def _within_int8(values: Tensor) -> Tensor:
    """int8 weights. A flipped -128 is +128, the one value int8 lacks; it becomes 127, in reference and file alike."""
    return values.clamp(-128, 127).to(torch.int8)
