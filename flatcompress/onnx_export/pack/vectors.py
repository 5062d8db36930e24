"""Scales and biases, one of each per output channel, in the bits they need and not one bit less.

A network of thin layers (a MobileNet at 2 bits) has a fifth of its bytes in them. Biases become offset binary of the
fewest bits that hold them, layers of like size in one stream; a scale's mantissa keeps its 23 bits, while its
exponent, which takes few values, becomes a digit. What comes out is what went in, bit for bit; onnxruntime folds the
sub-graph when it loads the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from flatcompress.onnx_export.emit.builder import FLOAT, INT32, GraphBuilder
from flatcompress.onnx_export.pack import digits
from flatcompress.onnx_export.pack.unpack import Unpacker

# About what the nodes and constants of one more stream take.
STREAM_BYTES = 400
MANTISSA = 23


def store_integers(builder: GraphBuilder, vectors: Mapping[str, NDArray[np.int32]]) -> dict[str, str]:
    """int32 vectors [C] in as many streams as save bytes; the names of the int32 tensors that come out."""
    made: dict[str, str] = {}
    for width, names in _streams(vectors):
        joined = np.concatenate([vectors[name] for name in names])
        wide = _integers(Unpacker(builder), joined, width)
        made |= _split(builder, wide, {name: vectors[name].size for name in names})
    return made


def bits_of(vector: NDArray[np.int32]) -> int:
    """The fewest bits, at least 8, of a two's complement that holds every value."""
    low, high = int(vector.min()), int(vector.max())
    return max(8, 1 + max(max(0, high).bit_length(), (-low - 1).bit_length() if low < 0 else 0))


def _streams(vectors: Mapping[str, NDArray[np.int32]]) -> list[tuple[int, list[str]]]:
    """Vectors sorted by bits and cut into runs of one width each: the cheapest way, by dynamic programming."""
    names = sorted((name for name, vector in vectors.items() if vector.size), key=lambda name: bits_of(vectors[name]))
    needed = [bits_of(vectors[name]) for name in names]
    sizes = np.concatenate([[0], np.cumsum([vectors[name].size for name in names])])
    best: list[tuple[float, int]] = [(0.0, 0)]  # up to vector i: bytes, and where its run begins
    for end in range(1, len(names) + 1):
        bits = stored_bits(needed[end - 1])
        costs = [best[k][0] + STREAM_BYTES + (sizes[end] - sizes[k]) * bits / 8 for k in range(end)]
        begin = int(np.argmin(costs))
        best.append((float(costs[begin]), begin))
    runs, end = [], len(names)
    while end:
        begin = best[end][1]
        runs.append((needed[end - 1], names[begin:end]))
        end = begin
    return runs[::-1]


def stored_bits(width: int) -> float:
    """Bits that `_integers` stores for a value of ``width`` bits."""
    low = _low_bits(width)
    return low if low >= width else low + digits.bits(1 << (width - low))


def _low_bits(width: int) -> int:
    """The part that lies in a plain integer type: 8, 16 or all 32 bits."""
    return 8 if width < 16 else 16 if width <= 24 else 32


def _integers(unpacker: Unpacker, values: NDArray[np.int32], width: int) -> str:
    b, low = unpacker.builder, _low_bits(width)
    if low >= width:
        kind = {8: np.int8, 16: np.int16, 32: np.int32}[low]
        name = b.constant(values.astype(kind))
        return name if low == 32 else b.cast(name, INT32)
    return split_low(unpacker, values.astype(np.int64) + (1 << (width - 1)), low, width, -(1 << (width - 1)))


def split_low(unpacker: Unpacker, codes: NDArray[np.int64], low: int, width: int, offset: int) -> str:
    """int32 ``codes + offset`` of unsigned codes of ``width`` bits: ``low`` of them as they are, digits above them."""
    b = unpacker.builder
    kind = np.uint8 if low == 8 else np.uint16
    below = b.cast(b.constant((codes & ((1 << low) - 1)).astype(kind)), INT32)
    table = ((np.arange(1 << (width - low), dtype=np.int64) << low) + offset).astype(np.int32).reshape(-1, 1)
    return b.op("Add", [below, unpacker.exactly(codes >> low, table, [codes.size])])


def store_floats(builder: GraphBuilder, vectors: Mapping[str, NDArray[np.float32]]) -> dict[str, str]:
    """Positive float32 vectors [C] as mantissas and exponents, where that saves bytes; else no names."""
    names = [name for name, vector in vectors.items() if _is_normal(vector)]
    if not names:
        return {}
    joined = np.concatenate([vectors[name] for name in names])
    exponent = np.frexp(joined)[1].astype(np.int64)
    first, radix = int(exponent.min()), max(2, int(exponent.max() - exponent.min()) + 1)
    saved = joined.size * (32 - MANTISSA - digits.bits(radix)) / 8 if radix <= 128 else 0
    if saved < 2 * STREAM_BYTES:
        return {}
    unpacker = Unpacker(builder)
    whole = 1 << MANTISSA
    # joined = (whole + rest) * 2 ** (exponent - 24), all of it exact: integers below 2 ** 24 are float32 values
    rest = (np.ldexp(joined.astype(np.float64), MANTISSA + 1 - exponent) - whole).astype(np.int64)
    mantissa = builder.cast(split_low(unpacker, rest, 16, MANTISSA, whole), FLOAT)
    powers = np.ldexp(np.float32(1), np.arange(first, first + radix) - MANTISSA - 1).astype(np.float32)
    power = unpacker.exactly(exponent - first, powers.reshape(-1, 1), [joined.size])
    return _split(builder, builder.op("Mul", [mantissa, power]), {name: vectors[name].size for name in names})


def _is_normal(vector: NDArray[np.float32]) -> bool:
    """Positive and far enough from the smallest float32 for a mantissa of integers."""
    return bool(vector.size) and bool((vector > math.ldexp(1, -100)).all()) and bool(np.isfinite(vector).all())


def _split(builder: GraphBuilder, joined: str, sizes: dict[str, int]) -> dict[str, str]:
    if len(sizes) == 1:
        return dict.fromkeys(sizes, joined)
    return dict(zip(sizes, builder.ops("Split", [joined, builder.ints(list(sizes.values()))], outputs=len(sizes))))
