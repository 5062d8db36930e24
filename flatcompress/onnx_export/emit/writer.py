"""The lowered graph as ONNX, node by node.

What makes onnxruntime run a layer on integers, and what this writer therefore does (measured with 1.31): a matrix's
DequantizeLinear carries an explicit zero point (a Conv's need not); the bias is int32 with its own DequantizeLinear; a
matrix layer is a Gemm on [B, C]; one QuantizeLinear per tensor; limits below 8 bits are a Clip on the uint8 tensor
behind it; operators that only move values work on the uint8 tensor itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import fx, nn

from flatcompress.errors import UserError
from flatcompress.graph.interface import KEY
from flatcompress.onnx_export.emit.builder import GraphBuilder
from flatcompress.onnx_export.emit.profiles import Integers, Profile, Stored, stored_once
from flatcompress.onnx_export.lower import integer
from flatcompress.onnx_export.lower.integer import Grid
from flatcompress.onnx_export.pack.packing import theoretical_bytes
from flatcompress.onnx_export.pack.vectors import store_floats, store_integers

ModuleEmitter = Callable[["Writer", fx.Node, Any], str]
FunctionEmitter = Callable[..., Any]
Emitters = tuple[dict[type[nn.Module], ModuleEmitter], dict[Any, FunctionEmitter], FunctionEmitter]

WEIGHTED = (integer.IntegerLayer, integer.WeightOnlyLayer)
FLOAT_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def array(tensor: torch.Tensor) -> NDArray[Any]:
    """A tensor's values as numpy."""
    return tensor.detach().cpu().numpy()


def as_matrix(node: fx.Node) -> bool:
    """Whether a linear layer sees [B, C] (Gemm) rather than something longer (MatMul)."""
    return len(node.args[0].meta["shape"]) == 2  # type: ignore[union-attr]


class Writer:
    """Writes one lowered graph with one profile. `write` gives the model; `layers` says how each was stored."""

    def __init__(self, gm: fx.GraphModule, profile: Profile, opset: int, emitters: Emitters) -> None:
        self.gm, self.profile = gm, profile
        self.modules, self.functions, self.translate = emitters
        self.builder = GraphBuilder(opset)
        self.env: dict[fx.Node, Any] = {}
        self.inputs: dict[fx.Node, str] = {}
        self.layers: list[dict[str, Any]] = []
        self.stored: dict[str, Stored] = {}
        self.biases: dict[str, str] = {}
        self.scales: dict[str, str] = {}
        self.grids: dict[str, Grid] = {}
        self.coded: dict[str, tuple[str, int]] = {}  # real tensor: its codes, and what is taken off them
        self._real: dict[tuple[str, bool], str] = {}

    # --- the walk ---------------------------------------------------------------------------------------------

    def write(self, metadata: dict[str, str], version: str) -> onnx.ModelProto:
        """The finished model."""
        self.stored = stored_once(self.profile, self.builder, self._integers())
        if self.profile.pack_vectors:
            self._store_vectors()
        self.inputs = input_names(self.gm)
        outputs: list[onnx.ValueInfoProto] = []
        for node in self.gm.graph.nodes:
            if node.op == "output":
                outputs = self._finish(node)
            else:
                made = getattr(self, f"_{node.op}")(node)
                self.env[node] = self.profile.moved(self, node, made) if self.profile.moved else made
        return self.builder.model(
            [_value_info(name, node) for node, name in self.inputs.items()],
            outputs,
            metadata=metadata,
            producer=("flatcompress", version),
            functions=[make(self.builder.opset) for make in self.profile.functions],
        )

    def _integers(self) -> dict[str, Integers]:
        found = {}
        for node in self.gm.graph.nodes:
            module = self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, WEIGHTED):
                values = array(module.weight)
                if isinstance(module, integer.WeightOnlyLayer) and module.kind == "linear" and not as_matrix(node):
                    values = np.ascontiguousarray(values.T)
                found[node.name] = Integers(values, module.weight_bits, getattr(module, "headroom", 0))
        return found

    def _store_vectors(self) -> None:
        """Scales and biases of all layers together, where the profile unpacks things when the file is loaded."""
        modules = {n.name: self.gm.get_submodule(str(n.target)) for n in self.gm.graph.nodes if n.op == "call_module"}
        layers = {name: module for name, module in modules.items() if isinstance(module, integer.IntegerLayer)}
        biases = {name: array(layer.bias) for name, layer in layers.items() if layer.bias is not None}
        self.biases = store_integers(self.builder, biases)
        # A convolution with a real result takes its scales in another shape.
        shared = {n: layer for n, layer in layers.items() if layer.kind == "linear" or layer.out_grid is not None}
        self.scales = store_floats(self.builder, {name: array(layer.scale) for name, layer in shared.items()})

    def bias_of(self, node: fx.Node, module: integer.IntegerLayer) -> str:
        """The int32 bias of a layer."""
        return self.biases.get(node.name) or self.constant(module.bias)  # type: ignore[arg-type]

    def scale_of(self, node: fx.Node, module: integer.IntegerLayer) -> str:
        """The float32 scales [C] of a layer's weights."""
        return self.scales.get(node.name) or self.builder.floats(array(module.scale))

    def _placeholder(self, node: fx.Node) -> str:
        name = self.inputs[node]
        half = self.profile.floats is not np.float32 and node.meta["dtype"].is_floating_point
        return self.builder.cast(name, TensorProto.FLOAT16) if half else name

    def _get_attr(self, node: fx.Node) -> str:
        return self.constant(getattr(self.gm, str(node.target)))

    def _call_module(self, node: fx.Node) -> str:
        module = self.gm.get_submodule(str(node.target))
        emit = next((e for kind, e in self.modules.items() if isinstance(module, kind)), None)
        if emit is None:
            raise UserError(f"module {node.meta.get('path')!r}: a {type(module).__name__} cannot be written to ONNX.")
        return emit(self, node, module)

    def _call_function(self, node: fx.Node) -> Any:
        """By the operator's own emitter, or, where it has none for these arguments, by torch's exporter."""
        emit = self.functions.get(node.target)
        reason = None
        if emit is not None:
            try:
                return emit(self, node, *node.args, **node.kwargs)
            except (UserError, TypeError) as error:  # TypeError: an overload's argument that the emitter does not take
                reason = str(error)
        try:
            return self.translate(self, node)
        except UserError as error:
            where = repr(node.meta["path"]) if node.meta.get("path") else "(the model's own forward)"
            because = f"{reason} " if reason else ""
            raise UserError(f"module {where}, operator {node.target}: {because}{error}") from None

    def _finish(self, node: fx.Node) -> list[onnx.ValueInfoProto]:
        """Give every result its name; one that is an input, a constant or another result gets a node of its own."""
        results = list(node.args[0]) if isinstance(node.args[0], tuple | list) else [node.args[0]]
        names = output_names(self.gm, len(results))
        for result, name in zip(results, names):
            last = self.env[result]  # type: ignore[index]
            if self.profile.floats is not np.float32 and result.meta["dtype"].is_floating_point:  # type: ignore[union-attr]
                last = self.builder.cast(last, TensorProto.FLOAT)
            shared = sum(self.env.get(other) == last for other in results) > 1  # type: ignore[arg-type]
            if shared or last in names or not any(last in n.output for n in self.builder.nodes):
                last = self.builder.op("Identity", [last])
            self.builder.rename(last, name)
            self.env = {n: name if v == last else v for n, v in self.env.items()}
        return [_value_info(name, result) for result, name in zip(results, names)]

    # --- values, for emitters ---------------------------------------------------------------------------------

    def value_of(self, node: fx.Node) -> torch.Tensor:
        """A constant's value. UserError for what the network computes."""
        if node.op != "get_attr":
            raise UserError(f"it takes constants only, and {node.name} is computed.")
        return getattr(self.gm, str(node.target))

    def tensor(self, value: Any) -> str:
        """The tensor name of a node, or of a Python number as a real constant."""
        if isinstance(value, fx.Node):
            return self.env[value]
        return self.number(value)

    def number(self, value: float | Sequence[float]) -> str:
        """A real constant in the profile's type."""
        return self.builder.constant(np.asarray(value, self.profile.floats))

    def constant(self, tensor: torch.Tensor) -> str:
        """A tensor as an initializer; real values in the profile's type."""
        values = array(tensor)
        return self.builder.constant(values.astype(self.profile.floats) if values.dtype.kind == "f" else values)

    def real_of(self, codes: str, grid: Grid, axis_size: tuple[int, int] | None = None) -> str:
        """DequantizeLinear of a uint8 tensor, one per tensor. ``axis_size``: per axis instead, see `layers`."""
        key = (codes, axis_size is not None)
        if key not in self._real:
            b = self.builder
            if axis_size is None:
                inputs = [b.floats(grid.scale), b.constant(np.uint8(grid.zero_point))]
                attributes: dict[str, Any] = {}
            else:
                axis, size = axis_size
                zero = b.constant(np.full(size, grid.zero_point, np.uint8))
                inputs, attributes = [b.floats([grid.scale] * size), zero], {"axis": axis}
            self._real[key] = b.op("DequantizeLinear", [codes, *inputs], **attributes)
        return self._real[key]

    def codes_of(self, real: str, grid: Grid, name: str = "") -> str:
        """QuantizeLinear, and a Clip where the grid is smaller than uint8."""
        b = self.builder
        zero = b.constant(np.uint8(grid.zero_point))
        codes = b.op("QuantizeLinear", [real, b.floats(grid.scale), zero], name=name)
        return self.clip_codes(codes, grid)

    def clip_codes(self, codes: str, grid: Grid) -> str:
        """A Clip of uint8 codes, left out where it does nothing."""
        if (grid.low, grid.high) == (0, 255):
            return codes
        limits = [self.builder.constant(np.uint8(v)) for v in (grid.low, grid.high)]
        return self.builder.op("Clip", [codes, *limits])

    def can_saturate(self, module: nn.Module) -> bool:
        """Whether an integer kernel of int8 weights may clip a layer on processors without VNNI."""
        floats = not isinstance(module, integer.IntegerLayer) or (module.kind == "conv" and module.out_grid is None)
        return self.profile.integer_kernels and not floats and bool(module.can_saturate)

    def unsigned(self, module: nn.Module) -> bool:
        """Whether a layer's weights are handed to the kernel as uint8; see `Profile`."""
        return self.profile.unsigned and self.can_saturate(module)

    def note_layer(self, node: fx.Node, module: Any) -> None:
        """Add a row about one weighted layer: what the report and the certificate show."""
        stored, floats = self.stored.get(node.name), np.dtype(self.profile.floats).itemsize
        values = array(module.weight)
        quantized = isinstance(module, WEIGHTED)
        bits = module.weight_bits if quantized else 8 * floats
        grid = getattr(module, "in_grid", None)
        self.layers.append(
            {
                "name": node.meta["path"],
                "kind": "linear" if values.ndim == 2 else "conv",
                "shape": list(values.shape),
                "weight_bits": bits,
                "activation_bits": grid.bits if grid else None,
                "encoding": stored.encoding if stored else np.dtype(self.profile.floats).name,
                "bytes": stored.bytes if stored else values.size * floats,
                "theoretical_bytes": self._least_bytes(stored, values, bits) if quantized else values.size * floats,
                "sparsity": float((values == 0).mean()),
                "unsigned": self.unsigned(module),
                "can_saturate": self.can_saturate(module) and not self.profile.unsigned,
            }
        )

    def _least_bytes(self, stored: Stored | None, values: Any, bits: int) -> float:
        """The least that a layer's integers take; nothing where they are another layer's."""
        return 0 if stored is not None and stored.shared else theoretical_bytes(values, bits)


def input_names(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """``input`` for the only one, else the names of the model's arguments."""
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return {node: "input" if len(nodes) == 1 else node.name for node in nodes}


def output_names(gm: fx.GraphModule, count: int) -> list[str]:
    """``output`` for the only one; the keys of a dictionary (or a dataclass that is one), else numbered."""
    if count == 1:
        return ["output"]
    shown = gm.meta[KEY].result(list(range(count))) if KEY in gm.meta else None
    names = [f"output_{index}" for index in range(count)]
    if isinstance(shown, Mapping):
        for key, value in shown.items():
            if isinstance(value, int):
                names[value] = str(key)
    taken = {node.name for node in gm.graph.nodes if node.op == "placeholder"}
    return [f"{name}_out" if name in taken else name for name in names]


def _value_info(name: str, node: Any) -> onnx.ValueInfoProto:
    """Sizes that differ from call to call have a name: ``batch`` the first, the input's and the axis the others."""
    dtype, open_ = node.meta["dtype"], node.meta.get("dynamic", {0})
    sizes = [
        ("batch" if not axis else f"{name}_{axis}") if axis in open_ else size
        for axis, size in enumerate(node.meta["shape"])
    ]
    kind = TensorProto.FLOAT
    if not dtype.is_floating_point:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(str(dtype).removeprefix("torch.")))
    return helper.make_tensor_value_info(name, kind, sizes)
