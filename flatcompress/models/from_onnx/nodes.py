"""What is told by one node or value of an ONNX graph alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from flatcompress.errors import UserError


def dequantized(node: onnx.NodeProto, inputs: list[NDArray[Any]]) -> NDArray[Any]:
    """(codes - zero point) * scale, both per tensor or along an axis."""
    codes, scale, *zero = inputs
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    shape = [1] * codes.ndim
    if scale.size > 1:
        if scale.ndim != 1:
            raise UserError(f"{called(node)} has scales in blocks, which are not read.")
        shape[axis % codes.ndim] = scale.size
    base = zero[0].astype(np.float64).reshape(shape) if zero else 0.0
    return ((codes.astype(np.float64) - base) * scale.astype(np.float64).reshape(shape)).astype(np.float32)


def path_of(name: str) -> str:
    """The module path in a node's name: "/layer1/layer1.0/conv1/Conv" is layer1.0.conv1."""
    if "/" not in name:
        return name
    parts: list[str] = []
    for part in [p for p in name.split("/") if p][:-1]:
        if parts and part.startswith(f"{parts[-1]}."):
            parts[-1] = part
        else:
            parts.append(part)
    return ".".join(parts) or name.strip("/")


def relu6(a: dict[str, Any], x: Tensor) -> Tensor:
    return nn.functional.relu6(x)


def called(node: onnx.NodeProto) -> str:
    name = (node.name or (node.output[0] if node.output else ""))[:80]
    return f"node {name!r} ({node.domain + '::' if node.domain not in ('', 'ai.onnx') else ''}{node.op_type})"


def real(values: NDArray[Any]) -> NDArray[Any]:
    """Every real type as float32, types that numpy lacks as int8."""
    if values.dtype.kind == "f" and values.dtype != np.float32:
        return values.astype(np.float32)
    if values.dtype.kind == "V" or values.dtype.name in ("bfloat16", "int4", "uint4", "int2", "uint2"):
        return values.astype(np.float32 if "float" in values.dtype.name else np.int32)
    return values


def plain_attribute(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, list):
        return [v.decode() if isinstance(v, bytes) else v for v in value]
    return list(value) if hasattr(value, "__iter__") and not isinstance(value, str) else value


def fixed_batch(inputs: list[onnx.ValueInfoProto]) -> int | None:
    """The batch that a file is fixed to, None where it is open."""
    dims = inputs[0].type.tensor_type.shape.dim if inputs else []
    return dims[0].dim_value if dims and dims[0].dim_value > 0 else None
