"""Looking at an ONNX file that may come from anywhere, before onnxruntime does.

Nothing a file names is imported or opened: a model whose tensors lie in other files, whose operators come from
unknown domains, or whose tensors claim sizes that their bytes do not have, is refused with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from flatcompress.errors import UserError

DOMAINS = ("", "ai.onnx", "com.microsoft", "qonnx.custom_op.general")
MOST_BYTES = 2 << 30
MOST_VALUES = 1 << 31
# Operators that make large tensors out of small ones, and the input that says how large.
_GROWING = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1}


def load(path: Path) -> onnx.ModelProto:
    """The parsed model. UserError with the reason when it is no ONNX file or not one to be run."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: larger than {MOST_BYTES} bytes.")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise UserError(f"{path}: not an ONNX file, or cut off ({error}).") from None
    problem = problem_of(model)
    if problem:
        raise UserError(f"{path}: {problem}")
    return model


def problem_of(model: onnx.ModelProto) -> str | None:
    """Why a parsed model should not be run, or None."""
    if not model.graph.node or not model.opset_import:
        return "not an ONNX model (it has no nodes)."
    graphs = list(_graphs(model.graph))
    nodes = [node for graph in graphs for node in graph.node] + [n for f in model.functions for n in f.node]
    strange = {node.domain for node in nodes} - set(DOMAINS)
    if strange:
        return f"operators of unknown domains {sorted(strange)}; known are {list(DOMAINS)}."
    tensors = [t for graph in graphs for t in graph.initializer]
    tensors += [t for graph in graphs for pair in graph.sparse_initializer for t in (pair.values, pair.indices)]
    tensors += [t for node in nodes for given in node.attribute for t in _tensors_of(given)]
    for tensor in tensors:
        problem = _tensor_problem(tensor)
        if problem:
            return problem
    return next((problem for graph in graphs if (problem := _growth_problem(graph))), None)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and the bodies of its branches and loops."""
    yield graph
    for node in graph.node:
        for given in node.attribute:
            for inner in ([given.g] if given.HasField("g") else []) + list(given.graphs):
                yield from _graphs(inner)


def _tensors_of(given: onnx.AttributeProto) -> list[TensorProto]:
    return ([given.t] if given.HasField("t") else []) + list(given.tensors)


def _tensor_problem(tensor: TensorProto) -> str | None:
    name = tensor.name[:80]
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        where = next((entry.value for entry in tensor.external_data if entry.key == "location"), "another file")
        return f"tensor {name!r} lies in {where!r}; files that need other files are not accepted."
    if any(dim < 0 for dim in tensor.dims):
        return f"tensor {name!r} has a negative size."
    count = math.prod(tensor.dims)
    if count > MOST_VALUES:
        return f"tensor {name!r} claims {count} values."
    bits = {TensorProto.INT4: 4, TensorProto.UINT4: 4, getattr(TensorProto, "INT2", -1): 2}.get(tensor.data_type)
    if tensor.HasField("raw_data"):
        wanted = -(-count * bits // 8) if bits else count * _itemsize(tensor.data_type)
        if wanted != len(tensor.raw_data):
            return f"tensor {name!r} claims {wanted} bytes and has {len(tensor.raw_data)}."
    return None


def _itemsize(kind: int) -> int:
    try:
        return helper.tensor_dtype_to_np_dtype(kind).itemsize
    except (KeyError, ValueError):
        return 0


def _growth_problem(graph: onnx.GraphProto) -> str | None:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        index = _GROWING.get(node.op_type)
        tensor = constants.get(node.input[index]) if index is not None and len(node.input) > index else None
        if tensor is None or tensor.data_type != TensorProto.INT64:
            continue
        sizes = onnx.numpy_helper.to_array(tensor).reshape(-1).tolist()
        if math.prod(max(1, int(size)) for size in sizes) > MOST_VALUES:
            return f"node {node.name or node.op_type!r} would make a tensor of {sizes}."
    return None
