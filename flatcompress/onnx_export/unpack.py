"""The ONNX sub-graphs that turn packed words back into int8 weights.

Only standard operators on constants (BitShift, Mod, Cast, Add, CumSum, Gather, ScatterElements, Split, Reshape), all of
them in opset 13, so onnxruntime folds the whole sub-graph when it loads the file and sees plain int8 initializers.
Tensors stored alike are concatenated into one *pool* and unpacked together: one sub-graph serves many small layers,
and its text would otherwise outweigh them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from flatcompress.onnx_export import packing
from flatcompress.onnx_export.builder import INT8, INT32, GraphBuilder
from flatcompress.onnx_export.packing import Encoding

# A pool is closed at this many weights: unpacking takes about nine bytes per weight for a moment, and text no longer
# matters for layers of this size.
POOL_VALUES = 1 << 20


@dataclass
class _Pool:
    encoding: Encoding
    names: list[str] = field(default_factory=list)
    values: int = 0


def write(builder: GraphBuilder, tensors: Mapping[str, tuple[NDArray[np.int8], Encoding]]) -> dict[str, str]:
    """Store every integer tensor by its encoding; returns the name of the int8 tensor, of its own shape, for each."""
    made: dict[str, str] = {}
    for pool in _pools(tensors):
        made |= _write_pool(builder, pool.encoding, {n: tensors[n][0] for n in pool.names})
    return made


def _pools(tensors: Mapping[str, tuple[NDArray[np.int8], Encoding]]) -> list[_Pool]:
    closed: list[_Pool] = []
    open_pools: dict[Encoding, _Pool] = {}
    for name, (values, encoding) in tensors.items():
        pool = open_pools.setdefault(encoding, _Pool(encoding))
        pool.names.append(name)
        pool.values += values.size
        if pool.values >= POOL_VALUES or _stands_alone(encoding):
            closed.append(open_pools.pop(encoding))
    return closed + list(open_pools.values())


def _stands_alone(encoding: Encoding) -> bool:
    """8-bit dense weights are initializers already; a pool would only add nodes."""
    return encoding == Encoding("dense", 8, -128)


def _write_pool(builder: GraphBuilder, encoding: Encoding, tensors: dict[str, NDArray[np.int8]]) -> dict[str, str]:
    if _stands_alone(encoding):
        return {name: builder.constant(values.astype(np.int8)) for name, values in tensors.items()}
    stored = [packing.encode(values, encoding) for values in tensors.values()]
    codes = np.concatenate([s.values for s in stored])
    if encoding.kind == "dense":
        return _split(builder, *_integers(builder, codes, encoding), tensors, encoding)
    marks = np.concatenate([s.marks for s in stored if s.marks is not None])
    if encoding.kind == "mask":
        return _split(builder, *_masked(builder, codes, marks, encoding), tensors, encoding)
    return _split(builder, *_scattered(builder, codes, marks, encoding), tensors, encoding)


def _codes(builder: GraphBuilder, codes: NDArray[np.int64], width: int, headroom: int = 0) -> tuple[str, int]:
    """Words and the shifts that cut them: int32 codes of shape [slots, words] and how many they are with padding.

    The codes come multiplied by ``2**headroom``, which is one more shift while they still lie in their words.
    """
    words = packing.pack(codes, width)
    size, kind, slots = packing.word_bits(width), words.dtype.type, packing.slots(width)
    cut = _cut_bytes if size == 8 else _cut_words
    right = cut(builder, builder.constant(words), kind, size, width)
    if headroom:
        right = builder.op("BitShift", [right, builder.constant(np.array(headroom, kind))], direction="LEFT")
    return builder.cast(right, INT32), words.size * slots


def _cut_bytes(builder: GraphBuilder, words: str, kind: Any, size: int, width: int) -> str:
    """Shifted right, modulo 2**width. OpenVINO 2026.4 does not drop the bits that a byte shifted left loses."""
    right = np.arange(0, size, width).astype(kind).reshape(-1, 1)
    shifted = builder.op("BitShift", [words, builder.constant(right)], direction="RIGHT")
    return builder.op("Mod", [shifted, builder.constant(np.array(1 << width, kind))])


def _cut_words(builder: GraphBuilder, words: str, kind: Any, size: int, width: int) -> str:
    """Shifted left until the slots above are gone, then right: a modulo of wide words would be slow."""
    left = [size - width * (slot + 1) for slot in range(size // width)]
    shifted = builder.op("BitShift", [words, builder.constant(np.array(left, kind).reshape(-1, 1))], direction="LEFT")
    return builder.op("BitShift", [shifted, builder.constant(np.array(size - width, kind))], direction="RIGHT")


def _integers(builder: GraphBuilder, codes: NDArray[np.int64], encoding: Encoding) -> tuple[str, int]:
    """int8 values (not yet flat) and their number with padding."""
    if encoding.width == 8:
        return builder.constant(((codes + encoding.offset) << encoding.headroom).astype(np.int8)), codes.size
    wide, count = _codes(builder, codes, encoding.width, encoding.headroom)
    offset = builder.constant(np.array(encoding.offset << encoding.headroom, np.int32))
    return builder.cast(builder.op("Add", [wide, offset]), INT8), count


def _flat(builder: GraphBuilder, tensor: str) -> str:
    return builder.op("Reshape", [tensor, builder.ints([-1])])


def _masked(
    builder: GraphBuilder, codes: NDArray[np.int64], mask: NDArray[np.int64], encoding: Encoding
) -> tuple[str, int]:
    """Non-zeros behind a zero, gathered by mask * cumsum(mask): where the mask is 0 the index is 0."""
    values, _ = _integers(builder, np.concatenate([[-encoding.offset], codes]), encoding)
    bits, count = _codes(builder, mask, 1)
    bits = _flat(builder, bits)
    running = builder.op("CumSum", [bits, builder.constant(np.array(0, np.int32))])
    index = builder.op("Mul", [running, bits])
    return builder.op("Gather", [_flat(builder, values), index]), count


def _scattered(
    builder: GraphBuilder, codes: NDArray[np.int64], index: NDArray[np.int64], encoding: Encoding
) -> tuple[str, int]:
    """``n`` values of each group of ``m`` put at their indices, zeros elsewhere."""
    groups = codes.size // encoding.n
    shape = builder.ints([groups, encoding.n])
    values = _trim(builder, *_integers(builder, codes, encoding), codes.size)
    marks = _trim(builder, *_codes(builder, index, encoding.m.bit_length() - 1), codes.size)
    zeros = builder.op(
        "ConstantOfShape",
        [builder.ints([groups, encoding.m])],
        value=helper.make_tensor("", INT8, [1], [0]),
    )
    scattered = builder.op(
        "ScatterElements",
        [zeros, builder.op("Reshape", [marks, shape]), builder.op("Reshape", [values, shape])],
        axis=1,
    )
    return scattered, groups * encoding.m


def _trim(builder: GraphBuilder, tensor: str, count: int, wanted: int) -> str:
    if count == wanted:
        return tensor
    return builder.op("Split", [_flat(builder, tensor), builder.ints([wanted, count - wanted])], outputs=2)


def _split(
    builder: GraphBuilder, tensor: str, count: int, tensors: dict[str, NDArray[np.int8]], encoding: Encoding
) -> dict[str, str]:
    """Cut the pool into its tensors; the padding falls off as one more, unused, piece."""
    sizes = [values.size for values in tensors.values()]
    if count > sum(sizes):
        sizes.append(count - sum(sizes))
    parts = [tensor]
    if len(sizes) > 1:
        parts = builder.ops("Split", [_flat(builder, tensor), builder.ints(sizes)], outputs=len(sizes))
    return {
        name: _shaped(builder, part, values.shape, encoding) for part, (name, values) in zip(parts, tensors.items())
    }


def _shaped(builder: GraphBuilder, tensor: str, shape: tuple[int, ...], encoding: Encoding) -> str:
    if not encoding.channels_last:
        return builder.op("Reshape", [tensor, builder.ints(shape)])
    moved = builder.op("Reshape", [tensor, builder.ints([shape[0], *shape[2:], shape[1]])])
    rank = len(shape)
    return builder.op("Transpose", [moved], perm=[0, rank - 1, *range(1, rank - 1)])
