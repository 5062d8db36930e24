"""The table of operators on real values: aten operator -> emitter.

An emitter gets the writer, the node and the operator's own arguments, and returns the name of its result, or a list of
names where torch gives several. What is not listed goes through torch's own exporter (`translated`), so this table
holds what networks use, in forms that reach down to opset 13. To add an operator, write an emitter and list it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from flatcompress.onnx_export.emit.activations import ACTIVATIONS
from flatcompress.onnx_export.emit.arithmetic import ARITHMETIC
from flatcompress.onnx_export.emit.indexing import INDEXING
from flatcompress.onnx_export.emit.norms import NORMS
from flatcompress.onnx_export.emit.pooling import POOLING
from flatcompress.onnx_export.emit.products import PRODUCTS
from flatcompress.onnx_export.emit.recurrent import RECURRENT
from flatcompress.onnx_export.emit.reductions import REDUCTIONS
from flatcompress.onnx_export.emit.shaping import SHAPING
from flatcompress.onnx_export.emit.writer import FunctionEmitter, Writer

aten = torch.ops.aten


def _embedding(w: Writer, node: fx.Node, weight: fx.Node, index: fx.Node, *_: Any) -> str:
    return w.builder.op("Gather", [w.tensor(weight), w.tensor(index)])


FUNCTIONS: dict[Any, FunctionEmitter] = {
    **SHAPING,
    **ARITHMETIC,
    **ACTIVATIONS,
    **REDUCTIONS,
    **POOLING,
    **PRODUCTS,
    **NORMS,
    **INDEXING,
    **RECURRENT,
    aten.embedding.default: _embedding,
}
