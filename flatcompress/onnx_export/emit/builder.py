"""A small ONNX graph builder: short tensor names, shared constants, the lowest opset that does.

Tensor names are counters (``a``, ``b``, ... ``ba``), because a low-bit network can be so small that the names of
its tensors outweigh its weights; node names are the module paths that people look for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

# First opset in which each operator has the form that this package writes; anything not listed is older than 13.
SINCE = {
    "LayerNormalization": 17,
    "Mish": 18,
    "HardSwish": 14,
    "Gelu": 20,
    "Trilu": 14,
    "GridSample": 16,
    **dict.fromkeys(("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot"), 18),
}


def letters(number: int) -> str:
    """0 -> a, 51 -> Z, 52 -> ba: short names of letters alone."""
    text = ALPHABET[number % len(ALPHABET)]
    while number := number // len(ALPHABET):
        text = ALPHABET[number % len(ALPHABET)] + text
    return text


class GraphBuilder:
    """Collects nodes and constants. ``opset`` is what is written; ``needed`` is what the nodes turned out to need."""

    def __init__(self, opset: int = 13) -> None:
        self.opset = opset
        self.needed = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.domains: dict[str, int] = {}
        self._count = 0
        self._named: dict[str, int] = {}
        self._shapes: list[onnx.ValueInfoProto] = []

    def fresh(self) -> str:
        """A tensor name not used before."""
        name = letters(self._count)
        self._count += 1
        return name

    def need(self, opset: int) -> None:
        """Say that a written form needs at least ``opset``."""
        self.needed = max(self.needed, opset)

    def constant(self, array: NDArray[Any] | np.generic) -> str:
        """The name of an initializer with these values; equal constants are stored once."""
        array = np.asarray(array)  # ascontiguousarray would turn a scalar into a vector
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._known:
            self._known[key] = self.raw(numpy_helper.from_array(array))
        return self._known[key]

    def floats(self, values: Any) -> str:
        """A float32 constant."""
        return self.constant(np.asarray(values, np.float32))

    def ints(self, values: Any) -> str:
        """An int64 constant, as shapes, axes and indices are."""
        return self.constant(np.asarray(values, np.int64))

    def raw(self, tensor: onnx.TensorProto) -> str:
        """Add a TensorProto as it is (types that numpy lacks) and name it."""
        tensor.name = self.fresh()
        self.constants[tensor.name] = tensor
        return tensor.name

    def op(self, kind: str, inputs: Sequence[str], *, name: str = "", outputs: int = 1, **attributes: Any) -> str:
        """Append a node; returns its first output (`ops` gives all of them)."""
        return self.ops(kind, inputs, name=name, outputs=outputs, **attributes)[0]

    def ops(
        self, kind: str, inputs: Sequence[str], *, name: str = "", outputs: int = 1, **attributes: Any
    ) -> list[str]:
        """Append a node with several outputs; returns their names."""
        self.need(SINCE.get(kind, 1))
        if name:  # runtimes want names to be unique; a layer called twice is one path
            self._named[name] = self._named.get(name, 0) + 1
            name += f":{self._named[name]}" if self._named[name] > 1 else ""
        made = [self.fresh() for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), made, name=name or None, **attributes))
        return made

    def cast(self, value: str, kind: int) -> str:
        """Cast to a TensorProto data type."""
        return self.op("Cast", [value], to=kind)

    def shape(self, tensor: str, kind: int, sizes: Sequence[int]) -> None:
        """Write down the shape of a tensor that shape inference cannot tell."""
        self._shapes.append(helper.make_tensor_value_info(tensor, kind, list(sizes)))

    def inline(self, model: onnx.ModelProto, feeds: Sequence[str]) -> list[str]:
        """Put another model's nodes here, its inputs being ``feeds``; returns the names of its outputs."""
        graph = model.graph
        names = {value.name: feed for value, feed in zip(graph.input, feeds)}
        for tensor in graph.initializer:
            copy = onnx.TensorProto()
            copy.CopyFrom(tensor)
            names[tensor.name] = self.raw(copy)
        for node in graph.node:
            self.nodes.append(self._renamed(node, names))
        return [names[value.name] for value in graph.output]

    def _renamed(self, node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
        """A copy under names of this graph; what its branches and loops define gets new names too."""
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.ClearField("name")
        copy.ClearField("doc_string")
        del copy.metadata_props[:]
        copy.input[:] = [names.get(name, name) for name in node.input]
        for given in copy.attribute:
            for body in ([given.g] if given.HasField("g") else []) + list(given.graphs):
                self._rename_body(body, dict(names))
        for name in node.output:
            names[name] = self.fresh() if name else ""
        copy.output[:] = [names[name] for name in node.output]
        return copy

    def _rename_body(self, body: onnx.GraphProto, names: dict[str, str]) -> None:
        for value in [*body.input, *body.initializer]:
            names[value.name] = self.fresh()
            value.name = names[value.name]
        renamed = [self._renamed(node, names) for node in body.node]
        del body.node[:], body.value_info[:]
        body.node.extend(renamed)
        for value in body.output:
            value.name = names.get(value.name, value.name)

    def rename(self, old: str, new: str) -> None:
        """Give a tensor that people see (the graph's output) a readable name."""
        for node in self.nodes:
            node.input[:] = [new if i == old else i for i in node.input]
            node.output[:] = [new if o == old else o for o in node.output]

    def model(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        *,
        metadata: dict[str, str] | None = None,
        producer: tuple[str, str] = ("flatcompress", ""),
        functions: Sequence[onnx.FunctionProto] = (),
    ) -> onnx.ModelProto:
        """The finished model: no doc strings, the lowest IR version the opset goes with."""
        constants = list(self.constants.values())
        graph = helper.make_graph(self.nodes, "g", list(inputs), list(outputs), constants, value_info=self._shapes)
        imports = [helper.make_opsetid("", self.opset)]
        # Functions came with IR version 8; onnx computes it from the standard domain's opset alone.
        oldest = 8 if functions else 0
        model = helper.make_model(
            graph,
            opset_imports=imports + [helper.make_opsetid(*known) for known in self.domains.items()],
            functions=list(functions),
            ir_version=max(oldest, helper.find_min_ir_version_for(imports)),
            producer_name=producer[0],
            producer_version=producer[1],
        )
        helper.set_model_props(model, metadata or {})
        return model


INT8, UINT8, INT32, FLOAT = TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32, TensorProto.FLOAT
