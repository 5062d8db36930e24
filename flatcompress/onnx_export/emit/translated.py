"""Operators without a row of their own: the maintained translations of torch's exporter (onnxscript's torchlib).

One operator is exported alone, by `torch.onnx.export`, and its nodes are put into the file. That decomposes what ONNX
lacks to core ATen first, so whatever torch's own exporter can write has a form here. It writes opset 18 and later and
takes seconds, which is why the operators that networks use have rows in `operators`.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from onnx import inliner
from torch import fx, nn

from flatcompress.errors import UserError
from flatcompress.graph.rewrite import schema_of
from flatcompress.onnx_export.emit.values import is_dynamic, shape_of, type_of
from flatcompress.onnx_export.emit.writer import Writer

OPSET = 18


class _Single(nn.Module):
    """One operator with its settings; the tensors it reads are the inputs."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__()
        self.node, self.sources = node, node.all_input_nodes

    def forward(self, *inputs: Any) -> Any:
        given = dict(zip(self.sources, inputs))
        args, kwargs = fx.map_arg((self.node.args, self.node.kwargs), given.__getitem__)  # type: ignore[misc]
        return self.node.target(*args, **kwargs)  # type: ignore[operator]


def translate(w: Writer, node: fx.Node) -> Any:
    """Write ``node`` as torch's exporter does: its result's name, or a list of names. UserError when it cannot."""
    w.builder.need(OPSET)
    schema = schema_of(node.target)
    results = 1 if schema is None else len(schema.returns)
    if w.builder.opset < OPSET:  # the file is written again at the opset that it turned out to need
        names = [w.builder.fresh() for _ in range(results)]
    else:
        names = w.builder.inline(_exported(w, node), [_fed(w, source) for source in node.all_input_nodes])
    return names if results > 1 else names[0]


def _fed(w: Writer, source: fx.Node) -> str:
    """A tensor, or a size (which this writer keeps as a vector of one) as the scalar that torch's exporter takes."""
    name = w.env[source]
    return name if "dtype" in source.meta else w.builder.op("Squeeze", [name])


def _exported(w: Writer, node: fx.Node) -> onnx.ModelProto:
    inputs = tuple(_example(w, source) for source in node.all_input_nodes)
    shapes = tuple(_open_dimensions(source) for source in node.all_input_nodes)
    try:
        with _quiet():
            program = torch.export.export(_Single(node), inputs, dynamic_shapes={"inputs": shapes}, strict=False)
            made = torch.onnx.export(program, dynamo=True, opset_version=max(OPSET, w.builder.opset), verbose=False)
    except ModuleNotFoundError as error:
        raise UserError(
            f"it is written by torch's exporter, which needs {error.name}: pip install {error.name}"
        ) from None
    except Exception as error:  # torch's exporter raises many kinds
        raise UserError(f"it has no ONNX form: {_reason(error)}.") from None
    assert made is not None
    return inliner.inline_local_functions(made.model_proto)


def _example(w: Writer, source: fx.Node) -> Any:
    if "dtype" not in source.meta:
        return int(source.meta.get("size", 2))
    dtype = type_of(source)
    real = torch.float16 if w.profile.floats().itemsize == 2 else torch.float32
    return torch.zeros(shape_of(source), dtype=real if dtype.is_floating_point else dtype)


def _open_dimensions(source: fx.Node) -> Any:
    open_ = torch.export.Dim.DYNAMIC
    if "dtype" not in source.meta:
        return open_
    if source.op == "get_attr":
        return None
    return {axis: open_ for axis in range(len(shape_of(source))) if is_dynamic(source, axis)} or None


def _reason(error: BaseException) -> str:
    """What torch's exporter stumbled over; its outer messages only say at which step."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return "torch's own exporter has none either (" + re.sub(r"\x1b\[[0-9;]*m", "", lines[0])[:200].rstrip(".") + ")"


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter prints its progress and warns about libraries that it does not find."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
