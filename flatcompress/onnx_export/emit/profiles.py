"""The ways a file can be written: which containers the weights go into, and from which opset on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from flatcompress.errors import UserError
from flatcompress.onnx_export.emit.builder import INT8, INT32, GraphBuilder
from flatcompress.onnx_export.lower.integer import Grid
from flatcompress.onnx_export.lower.prepare import MOVES
from flatcompress.onnx_export.pack import packing, unpack


@dataclass(frozen=True)
class Integers:
    """One layer's weights: int8 values, the bits of their grid, and the power of two the file multiplies them by."""

    values: NDArray[np.int8]
    bits: int
    headroom: int = 0

    @property
    def scaled(self) -> NDArray[np.int8]:
        """What the integer kernel gets."""
        return (self.values.astype(np.int16) << self.headroom).astype(np.int8)


Weights = Mapping[str, Integers]
INT2_SINCE = 25


@dataclass(frozen=True)
class Stored:
    """Where a layer's integers went: the name of an int8 tensor, how it is stored, and in how many bytes.

    ``shared``: another layer's tensor, which is the same; its bytes are counted there.
    """

    tensor: str
    encoding: str
    bytes: int
    shared: bool = False


@dataclass(frozen=True)
class Form:
    """Plain QDQ (`emit.qdq`). ``codes``: the type of activations, ``symmetric``: with zero point 0 alone.

    ``real_bias``: biases as float32. ``moves``: operators after which a tensor keeps its grid.
    """

    codes: type[np.integer] = np.uint8
    symmetric: bool = False
    real_bias: bool = False
    moves: frozenset[Any] = frozenset(MOVES | {torch.ops.aten.cat.default})

    def container(self, grid: Grid, where: str) -> tuple[type[np.integer], int, int]:
        """(type, what is taken off a code, zero point) for a grid. UserError when its codes do not fit."""
        shift = grid.zero_point if self.symmetric else -int(np.iinfo(self.codes).min)
        least, most = grid.low - shift, grid.high - shift
        if least < np.iinfo(self.codes).min or most > np.iinfo(self.codes).max:
            raise UserError(
                f"{where or 'the input'}: its {grid.bits}-bit codes run from {least} to {most} around a zero point of "
                "0, which int8 does not hold: quantize with symmetric: true."
            )
        return self.codes, shift, grid.zero_point - shift


@dataclass(frozen=True)
class Profile:
    """``integer``: needs a quantized model. ``floats``: the type of real weights. ``opset``: the lowest one.

    ``fold_weight_only``: integer weights on real inputs become float weights on load. ``pack_vectors``: scales
    and biases are stored in the bits they need. ``integer_kernels``: onnxruntime is expected to run the layers on
    integers. ``unsigned``: weights whose products can saturate in 16 bits are handed to the kernel as uint8 with zero
    point 128, whose kernels do not. ``functions``: of the opset, definitions that the file carries. ``c``: C sources
    are written beside it; ``litert``: a LiteRT file is, of weights with 8 bits, or with 4 where they fit. ``modules``:
    writers of modules in place of the ordinary ones. ``form``: of plain QDQ. ``moved``: what is written behind a node
    that has been written.
    """

    name: str
    store: Callable[[GraphBuilder, Weights], dict[str, Stored]]
    integer: bool = True
    floats: type[np.floating] = np.float32
    opset: int = 13
    fold_weight_only: bool = True
    pack_vectors: bool = False
    integer_kernels: bool = True
    unsigned: bool = False
    functions: tuple[Callable[[int], onnx.FunctionProto], ...] = ()
    c: bool = False
    litert: int = 0
    modules: dict[type, Callable[..., str]] = field(default_factory=dict)
    form: Form | None = None
    moved: Callable[..., Any] | None = None

    @property
    def fused(self) -> bool:
        """Whether onnxruntime's integer kernels are what the file is for. Plain QDQ is written for other compilers,
        with full int8 weights, which those kernels saturate with on x86 processors without VNNI.
        """
        return self.form is None


def stored_once(profile: Profile, builder: GraphBuilder, weights: Weights) -> dict[str, Stored]:
    """`Profile.store` in which equal integers of equal grids lie in the file once, as those of a block that runs twice.

    ``builder`` gets the tensors, ``weights`` are each layer's.
    """
    first: dict[tuple[Any, ...], str] = {}
    source = {
        name: first.setdefault((w.bits, w.headroom, w.values.shape, w.values.tobytes()), name)
        for name, w in weights.items()
    }
    made = profile.store(builder, {name: weights[name] for name in first.values()})
    return {
        name: made[name] if origin == name else replace(made[origin], bytes=0, shared=True)
        for name, origin in source.items()
    }


def store_packed(builder: GraphBuilder, weights: Weights) -> dict[str, Stored]:
    signs = {name: packing.row_signs(layer.values, layer.bits) for name, layer in weights.items()}
    values = {name: _signed_values(layer.values, signs[name]) for name, layer in weights.items()}
    found = {n: packing.Statistics.of(values[n], layer.bits, layer.headroom) for n, layer in weights.items()}
    chosen = packing.choose_together(found)
    unpacker = unpack.Unpacker(builder)
    made = unpacker.write({name: (values[name], encoding) for name, encoding in chosen.items()})
    made |= _turned_back(unpacker, made, {name: sign for name, sign in signs.items() if sign is not None}, values)
    return {
        name: Stored(
            made[name],
            encoding.label,
            found[name].stored(encoding) + (0 if signs[name] is None else -(-values[name].shape[0] // 8)),
        )
        for name, encoding in chosen.items()
    }


def _signed_values(values: NDArray[np.int8], signs: NDArray[np.int8] | None) -> NDArray[np.int8]:
    return values if signs is None else (values.astype(np.int16) * _column(signs, values)).astype(np.int8)


def _column(signs: NDArray[np.int8], values: NDArray[np.int8]) -> NDArray[np.int8]:
    return signs.reshape([-1] + [1] * (values.ndim - 1))


def _turned_back(
    unpacker: unpack.Unpacker,
    made: dict[str, str],
    signs: dict[str, NDArray[np.int8]],
    values: dict[str, NDArray[np.int8]],
) -> dict[str, str]:
    """Unpacked weights times their signs, which are a stream of bits for all layers together."""
    if not signs:
        return {}
    b, bits = unpacker.builder, np.concatenate([(sign < 0).astype(np.int64) for sign in signs.values()])
    stream = unpacker.exactly(bits, np.array([[1], [-1]], np.int32), [bits.size])
    parts = b.ops("Split", [stream, b.ints([sign.size for sign in signs.values()])], outputs=len(signs))
    found = {}
    for part, (name, sign) in zip(parts, signs.items()):
        column = b.op("Reshape", [part, b.ints(_column(sign, values[name]).shape)])
        found[name] = b.cast(b.op("Mul", [b.cast(made[name], INT32), column]), INT8)
    return found


def _signed(builder: GraphBuilder, tensor: str, signs: NDArray[np.int8]) -> str:
    """int8 times int8, by way of int32: opset 13 multiplies nothing narrower."""
    wide = builder.op("Mul", [builder.cast(tensor, INT32), builder.cast(builder.constant(signs), INT32)])
    return builder.cast(wide, INT8)


def store_int8(builder: GraphBuilder, weights: Weights) -> dict[str, Stored]:
    return {n: Stored(builder.constant(layer.scaled), "int8", layer.values.size) for n, layer in weights.items()}


def store_int4(builder: GraphBuilder, weights: Weights) -> dict[str, Stored]:
    return {name: _narrow(builder, layer) for name, layer in weights.items()}


def _knows_int2(builder: GraphBuilder) -> bool:
    """Whether INT2 can be written; asks for its opset when the onnx package has it."""
    if onnx.defs.onnx_opset_version() < INT2_SINCE:
        return False
    builder.need(INT2_SINCE)
    return builder.opset >= INT2_SINCE


def _narrow(builder: GraphBuilder, layer: Integers) -> Stored:
    """An ONNX INT2 or INT4 initializer and a Cast, which onnxruntime folds; INT8 for wider weights."""
    signs = packing.row_signs(layer.values, layer.bits)
    values = _signed_values(layer.values, signs)
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if layer.bits <= 2 and low >= -2 and high <= 1 and _knows_int2(builder):
        kind, width = TensorProto.INT2, 2
    elif layer.bits <= 4 and low >= -8 and high <= 7:
        kind, width = TensorProto.INT4, 4
    else:
        return Stored(builder.constant(layer.scaled), "int8", values.size)
    raw = _nibbles(values, width)
    # raw_data, because the helper's typed field takes eight bytes for two values
    tensor = builder.raw(helper.make_tensor("", kind, list(values.shape), raw, raw=True))
    wide = tensor
    if layer.headroom:
        factor = builder.constant(np.array(1 << layer.headroom, np.int32))
        wide = builder.op("Mul", [builder.cast(tensor, INT32), factor])
    stored = Stored(builder.cast(wide, INT8), f"INT{width}", len(raw))
    return stored if signs is None else replace(stored, tensor=_signed(builder, stored.tensor, _column(signs, values)))


def _nibbles(values: NDArray[np.int8], width: int) -> bytes:
    """Two's complement values of 2 or 4 bits, the first in the lowest bits of a byte, as ONNX wants them."""
    per_byte = 8 // width
    flat = np.zeros(-(-values.size // per_byte) * per_byte, np.uint8)
    flat[: values.size] = values.reshape(-1).astype(np.int8).view(np.uint8) & ((1 << width) - 1)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(width)
    return np.bitwise_or.reduce(flat.reshape(-1, per_byte) << shifts, axis=1).astype(np.uint8).tobytes()
