"""A .tflite file under construction: tensors, constants, operators, and the bytes they make.

The classes of the schema are those of the package ai-edge-litert, which also runs the file.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatcompress.errors import UserError

KINDS = {"float32": "FLOAT32", "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64", "bool": "BOOL"}
NIBBLE = "INT4"
IDENTIFIER = b"TFL3"
SCHEMA = 3


def schema() -> Any:
    """The schema's classes. UserError where ai-edge-litert is not installed."""
    try:
        return importlib.import_module("ai_edge_litert.schema_py_generated")
    except ImportError as error:
        raise UserError(
            "profile 'litert' writes its file with the package ai-edge-litert, which is not installed: "
            "pip install 'flatcompress[litert]'."
        ) from error


class Flat:
    """Tensors are numbers. Equal constants are one tensor, equal bytes one buffer."""

    def __init__(self) -> None:
        self.schema = schema()
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.buffers: list[Any] = [self.schema.BufferT()]
        self._codes: dict[str, Any] = {}
        self._bytes: dict[bytes, int] = {}
        self._constants: dict[Any, int] = {}

    # --- tensors ----------------------------------------------------------------------------------------------

    def tensor(
        self,
        shape: Sequence[int],
        kind: str,
        name: str,
        scale: float | None = None,
        zero: int = 0,
        open_axes: Collection[int] = (),
    ) -> int:
        """A tensor that an operator fills or the caller gives; ``open_axes`` may have another size at each call."""
        made = self.schema.TensorT()
        made.shape = [int(size) for size in shape]
        if open_axes:
            made.shapeSignature = [-1 if axis in open_axes else int(size) for axis, size in enumerate(shape)]
        made.type, made.name, made.hasRank = getattr(self.schema.TensorType, KINDS[kind]), name, True
        if scale is not None:
            made.quantization = self._quantization([scale], [zero], 0)
        self.tensors.append(made)
        return len(self.tensors) - 1

    def constant(
        self, values: Any, name: str = "", scales: Any = None, zero: int = 0, axis: int = 0, nibbles: bool = False
    ) -> int:
        """A constant; ``scales`` [1] or one per channel of ``axis``. ``nibbles``: int8 values as 4 bits each."""
        array: NDArray[Any] = np.asarray(values)
        data = packed(array) if nibbles else np.ascontiguousarray(array).tobytes()
        kind = NIBBLE if nibbles else KINDS[array.dtype.name]
        steps = () if scales is None else tuple(np.asarray(scales, np.float32).reshape(-1).tolist())
        key = (data, kind, array.shape, steps, zero, axis)
        if key not in self._constants:
            made = self.schema.TensorT()
            made.shape, made.type = list(array.shape), getattr(self.schema.TensorType, kind)
            made.name, made.hasRank = name or f"constant_{len(self._constants)}", True
            made.buffer = self._buffer(data)
            if steps:
                made.quantization = self._quantization(steps, [zero] * len(steps), axis)
            self.tensors.append(made)
            self._constants[key] = len(self.tensors) - 1
        return self._constants[key]

    def _quantization(self, scales: Sequence[float], zeros: Sequence[int], axis: int) -> Any:
        made = self.schema.QuantizationParametersT()
        made.scale, made.zeroPoint = np.asarray(scales, np.float32), np.asarray(zeros, np.int64)
        made.quantizedDimension = axis
        return made

    def _buffer(self, data: bytes) -> int:
        if data not in self._bytes:
            made = self.schema.BufferT()
            made.data = np.frombuffer(data, np.uint8)
            self.buffers.append(made)
            self._bytes[data] = len(self.buffers) - 1
        return self._bytes[data]

    # --- operators --------------------------------------------------------------------------------------------

    def op(
        self,
        name: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        version: int = 1,
        options: str | None = None,
        **settings: Any,
    ) -> None:
        """Append an operator. ``version``: the lowest that has what is asked; ``options``: the schema's class."""
        made = self.schema.OperatorT()
        made.opcodeIndex = self._code(name, version)
        made.inputs, made.outputs = [int(i) for i in inputs], [int(o) for o in outputs]
        if options is not None:
            made.builtinOptionsType = getattr(self.schema.BuiltinOptions, options)
            made.builtinOptions = getattr(self.schema, f"{options}T")()
            for key, value in settings.items():
                setattr(made.builtinOptions, key, value)
        self.operators.append(made)

    def _code(self, name: str, version: int) -> int:
        """An operator has one entry, of the highest version that a use of it needs."""
        if name not in self._codes:
            made = self.schema.OperatorCodeT()
            made.builtinCode = getattr(self.schema.BuiltinOperator, name)
            made.deprecatedBuiltinCode, made.version = min(made.builtinCode, 127), version
            self._codes[name] = made
        self._codes[name].version = max(self._codes[name].version, version)
        return list(self._codes).index(name)

    def counts(self) -> dict[str, int]:
        """How often each operator is used."""
        names, found = list(self._codes), dict.fromkeys(self._codes, 0)
        for operator in self.operators:
            found[names[operator.opcodeIndex]] += 1
        return found

    # --- the file ---------------------------------------------------------------------------------------------

    def finish(self, inputs: dict[str, int], outputs: dict[str, int], metadata: dict[str, str]) -> bytes:
        """The file's bytes, with one signature, ``serving_default``."""
        import flatbuffers

        s = self.schema
        graph, model, signature = s.SubGraphT(), s.ModelT(), s.SignatureDefT()
        graph.tensors, graph.operators, graph.name = self.tensors, self.operators, "main"
        graph.inputs, graph.outputs = list(inputs.values()), list(outputs.values())
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs, signature.outputs = self._maps(inputs), self._maps(outputs)
        model.version, model.description = SCHEMA, "flatcompress"
        model.operatorCodes, model.subgraphs = list(self._codes.values()), [graph]
        model.signatureDefs, model.metadata = [signature], [self._metadata(*item) for item in metadata.items()]
        model.buffers = self.buffers
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())

    def _maps(self, named: dict[str, int]) -> list[Any]:
        found = []
        for name, tensor in named.items():
            made = self.schema.TensorMapT()
            made.name, made.tensorIndex = name, tensor
            found.append(made)
        return found

    def _metadata(self, name: str, text: str) -> Any:
        made = self.schema.MetadataT()
        made.name, made.buffer = name, self._buffer(text.encode())
        return made


def packed(values: NDArray[Any]) -> bytes:
    """Values of -8 to 7, two in a byte, the first in its lower half."""
    flat = values.astype(np.int8).reshape(-1).view(np.uint8) & 15
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return (flat[0::2] | flat[1::2] << 4).astype(np.uint8).tobytes()
