"""`from_onnx`: a file, checked and read node by node while an example goes through it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, inliner, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from flatcompress.errors import UserError, nearest
from flatcompress.models.from_onnx.layers import DATA, LAYERS
from flatcompress.models.from_onnx.moves import MOVES
from flatcompress.models.from_onnx.nodes import (
    called,
    dequantized,
    fixed_batch,
    path_of,
    plain_attribute,
    real,
    relu6,
)
from flatcompress.models.from_onnx.operators import OPERATORS, type_of
from flatcompress.models.from_onnx.program import OneInput, OnnxModule, Slot, Step, plain
from flatcompress.models.from_onnx.windows import WINDOWS

MOST_VALUES = 1 << 28  # of a constant that a file computes
_TABLE = {**OPERATORS, **MOVES, **WINDOWS}
_NUMBERS = {"Add", "Sub", "Mul", "Div", "Pow"}
_MOVES = {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "MaxPool", "Identity",
          "DepthToSpace", "SpaceToDepth", "Concat", "Expand", "Tile"}  # fmt: skip
_POSITIVE = {"Relu", "Sigmoid", "HardSigmoid", "Softmax", "QuantizeLinear"}
_GROWING = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1}


def from_onnx(path: str | Path, example_input: Any = None) -> nn.Module:
    """The network in an ONNX file as a module in eval mode, with the file's outputs (to about 1e-5 of their size).

    example_input: a tensor, or a tuple of them for several inputs; needed where the file leaves a size open besides
    the first, which is taken for the batch. The module takes any batch. UserError for what is no ONNX file or not one
    to be opened (tensors in other files, unknown operator domains, sizes that its bytes do not have), and for a node
    that has no torch form, by its name.
    """
    file = Path(path)
    from flatcompress.onnx_export.proof import inspect_file  # it needs onnxruntime, which the other networks do not

    model = inspect_file.load(file)
    try:
        if model.functions:
            model = inliner.inline_local_functions(model)
        reader = _Reader(file, model)
        examples = _examples(file, reader.inputs, example_input)
        return reader.read([_with_batch(x, fixed_batch(reader.inputs)) for x in examples]).eval()
    except UserError as error:
        raise error if str(error).startswith(str(file)) else UserError(f"{file}: {error}") from None
    except Exception as error:  # a malformed graph fails in whatever it reaches first
        lines = str(error).splitlines() or [""]
        raise UserError(
            f"{file}: not a network that can be read ({type(error).__name__}: {lines[0][:200]})."
        ) from error


def _examples(file: Path, inputs: list[onnx.ValueInfoProto], given: Any) -> list[Tensor]:
    if given is not None:
        found = list(given) if isinstance(given, tuple | list) else [given]
        if len(found) != len(inputs) or not all(isinstance(t, Tensor) for t in found):
            raise UserError(f"{file}: example_input must be {len(inputs)} tensors: {[i.name for i in inputs]}.")
        return found
    made = []
    for value in inputs:
        dims = value.type.tensor_type.shape.dim
        sizes = [dim.dim_value if dim.dim_value > 0 else (2 if not axis else 0) for axis, dim in enumerate(dims)]
        if 0 in sizes:
            shape = [dim.dim_value or dim.dim_param or "?" for dim in dims]
            raise UserError(f"{file}: input {value.name!r} has open sizes {shape}; give an example_input.")
        dtype = type_of(value.type.tensor_type.elem_type)
        made.append(torch.randn(sizes) if dtype.is_floating_point else torch.zeros(sizes, dtype=dtype))
    return made


def _with_batch(x: Tensor, batch: int | None) -> Tensor:
    """x with as many samples as a file that is fixed to a batch takes."""
    return x if batch is None or not x.dim() else x[torch.arange(batch) % max(1, len(x))]


class _Reader:
    """One pass over the nodes: constants are computed, layers built, the rest becomes steps; the example's values tell
    ranks and sizes."""

    def __init__(self, file: Path, model: onnx.ModelProto) -> None:
        self.file, self.graph = file, model.graph
        self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
        self.imports = list(model.opset_import)
        self.constants: dict[str, NDArray[Any]] = {
            t.name: real(numpy_helper.to_array(t)) for t in self.graph.initializer
        }
        self.inputs = [value for value in self.graph.input if value.name not in self.constants]
        self.values: dict[str, Any] = {}
        self.same: dict[str, str] = {}
        self.made_by: dict[str, str] = {}
        self.grids: dict[str, tuple[float, float]] = {}
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.states: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.batch: int | None = None

    def read(self, examples: list[Tensor]) -> OnnxModule:
        names = [value.name for value in self.inputs]
        kind = OneInput if len(names) == 1 else OnnxModule
        self.module = kind(names, [value.name for value in self.graph.output])
        self.module.eval()
        self.values = dict(zip(names, examples))
        self.batch = fixed_batch(self.inputs)
        with torch.no_grad():
            for node in self.graph.node:
                self._node(node)
        self.module.sources = [self._slot(value.name) for value in self.graph.output]
        _note_last_uses(self.module)
        return self.module

    # --- one node -----------------------------------------------------------------------------------------------------

    def _node(self, node: onnx.NodeProto) -> None:
        given = [name for name in node.input if name]
        if node.op_type == "Constant" or all(name in self.constants for name in given):
            self._compute(node)
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            self._drop_quantizer(node)
        elif node.output[0] in self.same:
            pass  # an addition of a bias that its layer took over
        elif not self._layer(node):
            self._operator(node)

    def _compute(self, node: onnx.NodeProto) -> None:
        """A node of constants, by onnx's own reference (which lacks some versions of DequantizeLinear)."""
        if node.op_type == "DequantizeLinear":
            self._keep(node, [dequantized(node, [self.constants[name] for name in node.input if name])])
            return
        self._check_growth(node)
        inputs = [helper.make_value_info(name, onnx.TypeProto()) for name in dict.fromkeys(node.input) if name]
        outputs = [helper.make_value_info(name, onnx.TypeProto()) for name in node.output if name]
        graph = helper.make_graph([node], "constant", inputs, outputs)
        model = helper.make_model(graph, opset_imports=self.imports)
        feeds = {name: self.constants[name] for name in node.input if name}
        try:
            results = ReferenceEvaluator(model).run(None, feeds)
        except Exception as error:  # the reference raises whatever numpy does
            raise UserError(
                f"{called(node)} cannot be computed ({type(error).__name__}: {str(error)[:100]})."
            ) from None
        self._keep(node, list(results))

    def _keep(self, node: onnx.NodeProto, results: list[Any]) -> None:
        """Results of constants are constants, known by the name of the first of them."""
        for name, value in zip([n for n in node.output if n], results):
            self.constants[name] = real(np.asarray(value))
            if node.input:
                self.names[name] = self.names.get(node.input[0], node.input[0])

    def _check_growth(self, node: onnx.NodeProto) -> None:
        index = _GROWING.get(node.op_type)
        if index is None or len(node.input) <= index:
            return
        sizes = [max(1, int(v)) for v in self.constants[node.input[index]].reshape(-1)]
        count = float(np.prod(np.array(sizes, np.float64)))
        if node.op_type == "Tile":
            count *= self.constants[node.input[0]].size
        if count > MOST_VALUES:
            raise UserError(f"{called(node)} would make a constant of {sizes}.")

    def _drop_quantizer(self, node: onnx.NodeProto) -> None:
        """The codes of a quantized tensor stand for its real values here; their grid is kept for limits of codes."""
        source = node.input[0]
        if source not in self.values and source not in self.same:
            raise UserError(f"{called(node)} has a scale or zero point that is computed.")
        if node.op_type == "DequantizeLinear":
            self._alias(node.output[0], source)
            return
        scale = self.constants[node.input[1]]
        zero = self.constants[node.input[2]] if len(node.input) > 2 and node.input[2] else np.zeros(1, np.uint8)
        codes = np.iinfo(zero.dtype) if zero.dtype.kind in "iu" else None
        if (
            codes is not None
            and (zero == codes.min).all()
            and self.made_by.get(self.same.get(source, source)) not in _POSITIVE
        ):
            # Quantizing tools take away a ReLU or ReLU6 before codes that have no negative values.
            step = float(scale.reshape(-1)[0])
            six = scale.size == 1 and abs((codes.max - codes.min) * step - 6) < step / 2
            function = _TABLE["Relu"] if not six else relu6
            self._append(node, Step(called(node), (node.output[0],), (self._slot(source),), function=function))
        else:
            self._alias(node.output[0], source)
        if scale.size == 1:
            self.grids[node.output[0]] = (float(scale.reshape(-1)[0]), float(zero.reshape(-1)[0]))

    def _alias(self, name: str, source: str) -> None:
        self.same[name] = self.same.get(source, source)

    def _layer(self, node: onnx.NodeProto) -> bool:
        maker = LAYERS.get(node.op_type)
        if maker is None:
            return False
        attributes, names = self._attributes(node), list(node.input)
        constants = [self.constants.get(name) for name in names]
        fused = self._bias_behind(node) if node.op_type == "MatMul" else None
        if fused is not None:
            constants.append(self.constants[fused[1]])
        index = DATA.get(node.op_type, 0)
        if constants[index] is not None:
            return False
        data = self._value(names[index])
        try:
            layer = maker(attributes, constants, tuple(data.shape))
        except UserError as error:
            raise UserError(f"{called(node)} {error}") from None
        if layer is None:
            return False
        path = self._place(node, layer.eval())  # or a BatchNorm would learn from the example
        self._append(node, Step(called(node), tuple(node.output), (self._slot(names[index]),), layer=path))
        if fused is not None:
            self._alias(fused[0], node.output[0])
        return True

    def _bias_behind(self, node: onnx.NodeProto) -> tuple[str, str] | None:
        """(result, bias) of the Add that follows a MatMul, when it adds a constant vector and nobody else looks."""
        users = self.users.get(node.output[0], [])
        weight = self.constants.get(node.input[1])
        if len(users) != 1 or users[0].op_type != "Add" or weight is None or weight.ndim != 2:
            return None
        other = next(
            name for name in [*users[0].input, node.output[0]] if name != node.output[0] or name == users[0].input[1]
        )
        bias = self.constants.get(other)
        if bias is None or bias.size != weight.shape[1] or bias.shape[-1:] != (weight.shape[1],):
            return None
        return users[0].output[0], other

    def _operator(self, node: onnx.NodeProto) -> None:
        function = _TABLE.get(node.op_type) if node.domain in ("", "ai.onnx") or node.op_type == "Gelu" else None
        if function is None:
            guess = nearest(node.op_type, list(_TABLE))
            hint = f" (there is {guess})" if guess and guess != node.op_type else ""
            raise UserError(f"{called(node)} has no torch form here{hint}.")
        attributes = self._attributes(node)
        inputs = tuple(self._input(node, index, name) for index, name in enumerate(node.input))
        self._append(node, Step(called(node), tuple(node.output), inputs, function=function, attributes=attributes))

    def _append(self, node: onnx.NodeProto, step: Step) -> None:
        try:
            result = self.module.run_step(step, self.values)
        except UserError as error:
            raise UserError(f"{step.name} {error}") from None
        except Exception as error:  # torch's own reasons: shapes, types
            lines = str(error).splitlines() or [type(error).__name__]
            raise UserError(f"{step.name} does not run on the example ({lines[0][:200]}).") from None
        self.values.update(zip(step.outputs, result if isinstance(result, tuple) else (result,)))
        self.module.steps.append(step)
        self.made_by.update(dict.fromkeys(node.output, node.op_type))
        carried = self._grid(node.input[0]) if node.op_type in _MOVES and node.input else None
        if carried:
            self.grids.update(dict.fromkeys(node.output, carried))

    # --- values -------------------------------------------------------------------------------------------------------

    def _grid(self, name: str) -> tuple[float, float] | None:
        return self.grids.get(name)

    def _value(self, name: str) -> Any:
        return self.values[self.same.get(name, name)]

    def _slot(self, name: str) -> Slot:
        if not name:
            return Slot("plain")
        if name in self.constants:
            return self._constant(name)
        return Slot("value", self.same.get(name, name))

    def _input(self, node: onnx.NodeProto, index: int, name: str) -> Slot:
        """A limit of codes becomes the real number it stands for; numbers in arithmetic are numbers."""
        grid = self._grid(node.input[0])
        if name in self.constants:
            value = self.constants[name]
            if grid and index and node.op_type == "Clip":
                return Slot("plain", np.float64((float(value) - grid[1]) * grid[0]))
            if node.op_type in _NUMBERS and value.size == 1 and value.dtype.kind == "f" and value.ndim <= 1:
                return Slot("plain", plain(value))
        elif grid and node.op_type not in _MOVES and node.op_type != "Clip":
            raise UserError(f"{called(node)} computes with the codes of a quantized tensor, which has no float form.")
        return self._slot(name)

    def _constant(self, name: str) -> Slot:
        """Real values are parameters (buffers when single), whole numbers stay what they are unless they are data."""
        value = self.constants[name]
        if value.dtype.kind != "f" and value.ndim <= 1 and value.size <= 64:
            return Slot("plain", value)
        if name not in self.states:
            held = torch.from_numpy(np.array(value))
            path = f"constant_{len(self.states)}"
            if value.dtype.kind == "f" and value.size > 1:
                self.module.register_parameter(path, nn.Parameter(held))
            else:
                self.module.register_buffer(path, held)
            self.states[name] = path
        return Slot("state", self.states[name])

    def _attributes(self, node: onnx.NodeProto) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for given in node.attribute:
            if given.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
                raise UserError(f"{called(node)} holds a graph of its own (a branch or loop), which is not read.")
            found[given.name] = plain_attribute(helper.get_attribute_value(given))
        return {**found, "opset": self.opset, "op": node.op_type, "outputs": len(node.output), "batch": self.batch,
                "given": [bool(name) for name in node.input]}  # fmt: skip

    # --- names --------------------------------------------------------------------------------------------------------

    def _place(self, node: onnx.NodeProto, layer: nn.Module) -> str:
        """Put a layer under a name that people know: of its weight's tensor, or of the node."""
        owner: nn.Module = self.module
        parts = self._path(node)
        for part in parts[:-1]:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
            if type(owner) is not nn.Module:
                break
        if type(owner) in (nn.Module, OneInput, OnnxModule) and not hasattr(owner, parts[-1]):
            owner.add_module(parts[-1], layer)
            return ".".join(parts)
        path = f"{node.op_type.lower()}_{len(self.module.steps)}"
        self.module.add_module(path, layer)
        return path

    def _path(self, node: onnx.NodeProto) -> list[str]:
        weight = next((self.names.get(n, n) for n in node.input[1:2] if n in self.constants), "")
        match = re.fullmatch(r"([A-Za-z_][\w.]*)[._]weight(_quantized|_q)?", weight)
        text = match[1] if match else path_of(node.name)
        parts = [re.sub(r"\W", "_", part) for part in text.split(".") if part]
        parts = [f"_{part}" if part[0].isdigit() and len(parts) == 1 else part for part in parts]
        return parts or [f"{node.op_type.lower()}_{len(self.module.steps)}"]


def _note_last_uses(module: OnnxModule) -> None:
    """Values are let go after their last reader."""
    kept = {slot.content for slot in module.sources if slot.kind == "value"}
    seen: set[str] = set(kept)
    steps = []
    for step in reversed(module.steps):
        read = {slot.content for slot in step.inputs if slot.kind == "value"}
        ended = tuple(sorted((read | set(step.outputs)) - seen))
        seen |= read
        steps.append(Step(step.name, step.outputs, step.inputs, step.layer, step.function, step.attributes, ended))
    module.steps = steps[::-1]
