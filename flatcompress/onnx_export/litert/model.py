"""The LiteRT file of one exported model: write it beside the ONNX file, run it, and compare it with the reference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from flatcompress.onnx_export.litert.flat import schema
from flatcompress.onnx_export.litert.functions import FUNCTIONS
from flatcompress.onnx_export.litert.layers import MODULES
from flatcompress.onnx_export.litert.writer import Writer
from flatcompress.storage import sha256_file, write_output

SUFFIX = ".tflite"
ABOUT = "flatcompress.litert"

Batches = Sequence[tuple[NDArray[Any], ...]]


@dataclass
class LiteRTModel:
    """``path``: of the file; ``figures``: for the certificate."""

    path: Path
    figures: dict[str, Any]


def place(path: Path) -> Path:
    """Where the LiteRT file of an ONNX file lies: beside it, by the same name."""
    return path.with_suffix(SUFFIX)


def prepare(reference: fx.GraphModule, metadata: dict[str, str], narrow: bool = False) -> tuple[bytes, dict[str, Any]]:
    """The file's bytes and what is known of it. ``narrow``: weights of up to 4 bits are stored as int4.

    UserError for a module or an operator without a LiteRT form, and where ai-edge-litert is not installed.
    """
    writer = Writer(reference, MODULES, FUNCTIONS, narrow)
    data = writer.write(metadata, ABOUT)
    layers = {row["name"]: row["stored"] for row in writer.layers}
    integer = [row["name"] for row in writer.layers if row["integer"]]
    figures = {
        "operators": writer.flat.counts(),
        "layers": layers,
        "integer_layers": len(integer),
        "not_integer": [name for name in layers if name not in integer],
        "weight_bytes": sum(row["bytes"] for row in writer.layers),
    }
    return data, figures


def write(made: tuple[bytes, dict[str, Any]], path: Path) -> LiteRTModel:
    """Write the LiteRT file of the ONNX file ``path``."""
    data, figures = made
    target = place(path)
    write_output(target, data)
    return LiteRTModel(target, {"name": target.name, "sha256": sha256_file(target), "bytes": len(data), **figures})


def run(
    path: Path, names: Sequence[str], batches: Batches, output: int = 0, delegates: bool = True
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Outputs [N, ...] of the file, and ``layers``, ``integer_layers``. Batches are in torch's order of axes.

    ``delegates``: with XNNPACK, as LiteRT runs on CPUs by default; else with its built-in kernels, which round twice.
    """
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    about = described(path)
    kind = OpResolverType.AUTO if delegates else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(model_path=str(path), experimental_op_resolver_type=kind, num_threads=1)
    found: list[NDArray[np.float32]] = []
    for batch in batches:
        given = {name: ordered(values, about["inputs"][name]) for name, values in zip(names, batch)}
        found.append(_outputs(interpreter, given, output))
    how = "XNNPACK and built-in kernels" if delegates else "built-in kernels"
    return np.concatenate(found), {"how": how, **{key: about[key] for key in ("integer_layers", "layers")}}


def _outputs(interpreter: Any, given: dict[str, NDArray[Any]], output: int) -> NDArray[np.float32]:
    inputs = interpreter.get_input_details()
    by_name = {detail["name"]: detail for detail in inputs}
    for name, values in given.items():
        if tuple(by_name[name]["shape"]) != values.shape:
            interpreter.resize_tensor_input(by_name[name]["index"], values.shape)
    interpreter.allocate_tensors()
    for name, values in given.items():
        interpreter.set_tensor(by_name[name]["index"], values)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[output]["index"])


def ordered(values: NDArray[Any], order: str) -> NDArray[Any]:
    """A batch in torch's order of axes as the file takes it."""
    if order == "NHWC":
        return np.ascontiguousarray(values.transpose(0, 2, 3, 1))
    if order == "N1TC":
        return np.ascontiguousarray(values.transpose(0, 2, 1)[:, None])
    return np.ascontiguousarray(values)


def described(path: Path) -> dict[str, Any]:
    """What the writer put into the file: ``inputs``, the order of axes of each; ``layers``, ``integer_layers``."""
    model = schema().ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    for entry in model.metadata or ():
        if entry.name.decode() == ABOUT:
            return json.loads(bytes(model.buffers[entry.buffer].data).decode())
    raise ValueError(f"{path} was not written by flatcompress: it has no metadata {ABOUT!r}.")
