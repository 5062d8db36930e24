"""Rules that tools publish for the files they read, as functions: a model in, a sentence per breach out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

Rule = Callable[[onnx.ModelProto], list[str]]
SHOWN = 3
QDQ = ("QuantizeLinear", "DequantizeLinear")


def operators(*domains: str) -> Rule:
    """No operator of a domain other than ONNX's own and ``domains``."""

    def check(model: onnx.ModelProto) -> list[str]:
        foreign = {n.domain for n in model.graph.node} - {"", "ai.onnx", *domains}
        return [f"operators of the domain {name!r}" for name in sorted(foreign)]

    return check


def opset(least: int) -> Rule:
    """At least this opset."""

    def check(model: onnx.ModelProto) -> list[str]:
        found = next((i.version for i in model.opset_import if i.domain in ("", "ai.onnx")), 0)
        return [f"opset {found}; {least} is the lowest"] if found < least else []

    return check


def codes(*kinds: int) -> Rule:
    """Every quantized activation is of one of these ONNX types."""

    def check(model: onnx.ModelProto) -> list[str]:
        constants = _constants(model)
        zeros = {n.input[2] for n in model.graph.node if n.op_type == "QuantizeLinear" and len(n.input) > 2}
        found = {constants[z].data_type for z in zeros if z in constants} - set(kinds)
        names = [TensorProto.DataType.Name(kind).lower() for kind in kinds]
        return [f"activations of type {TensorProto.DataType.Name(k).lower()}; {' or '.join(names)} is read"
                for k in sorted(found)]  # fmt: skip

    return check


def symmetric(model: onnx.ModelProto) -> list[str]:
    """Every zero point is 0."""
    return _zero_points(model, [n for n in model.graph.node if n.op_type in QDQ])


def symmetric_weights(model: onnx.ModelProto) -> list[str]:
    """Weights are int8 initializers with zero points of 0."""
    constants = _constants(model)
    nodes = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in constants]
    kinds = {constants[n.input[0]].data_type for n in nodes} - {TensorProto.INT8, TensorProto.INT32}
    wrong = [f"weights of type {TensorProto.DataType.Name(k).lower()}; int8 is read" for k in sorted(kinds)]
    return wrong + _zero_points(model, nodes)


def per_channel(model: onnx.ModelProto) -> list[str]:
    """A DequantizeLinear with a scale per channel has axis 0 or 1 and a constant scale."""
    constants = _constants(model)
    wrong = [n for n in model.graph.node if n.op_type in QDQ and not set(n.input[1:]) <= set(constants)]
    return _named(wrong, "a scale or zero point that is computed, not a constant")


def real_biases(model: onnx.ModelProto) -> list[str]:
    """No DequantizeLinear of int32: biases are real."""
    constants = _constants(model)
    wrong = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in constants
             and constants[n.input[0]].data_type == TensorProto.INT32]  # fmt: skip
    return _named(wrong, "a DequantizeLinear of int32; biases are to be real")


def plain(model: onnx.ModelProto) -> list[str]:
    """What QuantizeLinear makes goes into DequantizeLinear and nothing else, and no weight is unpacked in the graph."""
    made = {o for n in model.graph.node if n.op_type == "QuantizeLinear" for o in n.output}
    constants = set(_constants(model))
    wrong = [n for n in model.graph.node if n.op_type != "DequantizeLinear" and set(n.input) & made]
    found = _named(wrong, "an operator on an integer tensor")
    other = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in made | constants]
    return found + _named(other, "a DequantizeLinear of what is neither a constant nor a QuantizeLinear's result")


def _constants(model: onnx.ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _zero_points(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> list[str]:
    constants = _constants(model)
    wrong = [n for n in nodes if len(n.input) > 2 and n.input[2] in constants
             and np.any(numpy_helper.to_array(constants[n.input[2]]))]  # fmt: skip
    return _named(wrong, "a zero point that is not 0")


def _named(nodes: list[onnx.NodeProto], what: str) -> list[str]:
    """One sentence for all breaches of a kind, the first ones by name."""
    if not nodes:
        return []
    shown = ", ".join(n.name or f"{n.op_type} -> {n.output[0]}" for n in nodes[:SHOWN])
    return [f"{what}: {shown}{f' and {len(nodes) - SHOWN} more' if len(nodes) > SHOWN else ''}"]
