"""The ONNX sub-graphs that turn packed digits back into int8 weights.

Only standard operators on constants (Cast, Gather, Add, NonZero, ScatterElements, Split, Reshape and, for the tables,
Range, Div and Mod), all of them in opset 13, so onnxruntime folds the whole sub-graph when it loads the
file and sees plain int8 initializers; OpenVINO does the same. Tensors stored alike are concatenated into one *pool*
and unpacked together: one sub-graph serves many small layers, and its text would otherwise outweigh them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from flatcompress.onnx_export.emit.builder import INT8, INT32, GraphBuilder
from flatcompress.onnx_export.pack import digits, packing
from flatcompress.onnx_export.pack.packing import Encoding

# A pool is closed at this many weights: unpacking takes about nine bytes per weight for a moment, and text no longer
# matters for layers of this size.
POOL_VALUES = 1 << 20


@dataclass
class _Pool:
    encoding: Encoding
    names: list[str] = field(default_factory=list)
    values: int = 0


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
    return encoding.kind == "dense" and digits.digits(encoding.radix) == 1


class Unpacker:
    """Writes streams of digits and what makes weights of them; a table is written once."""

    def __init__(self, builder: GraphBuilder) -> None:
        self.builder = builder
        self._tables: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def write(self, tensors: Mapping[str, tuple[NDArray[np.int8], Encoding]]) -> dict[str, str]:
        """Store integer tensors by their encodings; the name of the int8 tensor, of its own shape, for each."""
        made: dict[str, str] = {}
        for pool in _pools(tensors):
            made |= self.pool(pool.encoding, {name: tensors[name][0] for name in pool.names})
        return made

    def pool(self, encoding: Encoding, tensors: dict[str, NDArray[np.int8]]) -> dict[str, str]:
        """Store tensors of one encoding together."""
        b = self.builder
        if _stands_alone(encoding):
            shifted = {n: (v.astype(np.int16) << encoding.headroom).astype(np.int8) for n, v in tensors.items()}
            return {name: b.constant(values) for name, values in shifted.items()}
        flat = np.concatenate([packing.ordered(values, encoding) for values in tensors.values()])
        if encoding.masked and not flat.any():  # no stream to reshape: a size of 0 means another thing there
            return self._split(b.cast(self._zeros([1, flat.size]), INT8), flat.size, tensors, encoding)
        stored = packing.encode(flat, encoding)
        make = {"dense": self._dense, "mask": self._mask, "groups": self._groups, "nm": self._sets}[encoding.kind]
        return self._split(*make(stored, encoding, flat.size), tensors, encoding)

    # --- streams ----------------------------------------------------------------------------------------------

    def stream(self, codes: NDArray[np.int64], table: NDArray[Any]) -> tuple[str, int]:
        """What ``table`` [radix, k] has for every digit, in order, and how many digits with padding."""
        radix = table.shape[0]
        small = np.array_equal(table.astype(np.int8).astype(table.dtype), table)
        if digits.digits(radix) == 1 and small:  # bytes already, so they are stored as what they stand for
            return self._typed(table[codes].astype(np.int8), table.dtype), codes.size
        rows = self.builder.op("Gather", [self._rows(table), self._indices(codes, radix)], axis=0)
        return rows, digits.padded(codes.size, radix)

    def exactly(self, codes: NDArray[np.int64], table: NDArray[Any], shape: list[int]) -> str:
        """`stream` without its padding, in ``shape``."""
        rows, count = self.stream(codes, table)
        width = table.shape[1]
        if count != codes.size:
            sizes = self.builder.ints([codes.size * width, (count - codes.size) * width])
            rows = self.builder.op("Split", [self._flat(rows), sizes], outputs=2)
        return self.builder.op("Reshape", [rows, self.builder.ints(shape)])

    def _indices(self, codes: NDArray[np.int64], radix: int) -> str:
        numbers, higher = digits.indices(codes, radix), digits.above(radix)
        low = self.builder.cast(self.builder.constant((numbers & 255).astype(np.uint8)), INT32)
        if higher == 1:
            return low
        high, _ = self.stream(numbers >> 8, 256 * np.arange(higher, dtype=np.int32).reshape(-1, 1))
        return self.builder.op("Add", [low, self._flat(high)])

    def _rows(self, table: NDArray[Any]) -> str:
        """[indices, digits, k]: what the digits of every index stand for, worked out from what one digit does."""
        key = (str(table.dtype), table.shape, table.tobytes())
        if key not in self._tables:
            b, radix = self.builder, table.shape[0]
            count = digits.digits(radix)
            places = b.constant((radix ** np.arange(count)).astype(np.int32))
            digit = b.op("Mod", [b.op("Div", [self._column(radix**count), places]), b.constant(np.int32(radix))])
            steps = np.diff(table[:, 0])
            if table.dtype == np.int32 and table.shape[1] == 1 and radix > 16 and (steps == steps[0]).all():
                scaled = b.op("Mul", [digit, b.constant(steps[0])])
                self._tables[key] = b.op("Add", [scaled, b.constant(table[0, 0])])
            else:
                one = b.constant(table if table.shape[1] > 1 else table[:, 0])
                self._tables[key] = b.op("Gather", [one, digit], axis=0)
        return self._tables[key]

    def _column(self, size: int) -> str:
        """int32 [size, 1]: 0, 1, 2 .."""
        b, key = self.builder, ("", (size,), b"")
        if key not in self._tables:
            counted = b.op("Range", [b.constant(np.int32(value)) for value in (0, size, 1)])
            self._tables[key] = b.op("Reshape", [counted, b.ints([-1, 1])])
        return self._tables[key]

    def _typed(self, values: NDArray[np.int8], kind: Any) -> str:
        stored = self.builder.constant(values)
        return stored if kind == np.int8 else self.builder.cast(stored, helper.np_dtype_to_tensor_dtype(kind))

    def _flat(self, tensor: str) -> str:
        return self.builder.op("Reshape", [tensor, self.builder.ints([-1])])

    # --- one method per kind: the int8 values, not yet flat, and their number with padding --------------------------

    def _dense(self, stored: packing.Stored, encoding: Encoding, size: int) -> tuple[str, int]:
        return self.stream(stored.values, _alphabet(encoding, np.int8))

    def _mask(self, stored: packing.Stored, encoding: Encoding, size: int) -> tuple[str, int]:
        assert stored.marks is not None
        mask, count = self.stream(stored.marks, np.arange(2, dtype=np.uint8).reshape(-1, 1))
        return self._weights(mask, count, stored, encoding), count

    def _groups(self, stored: packing.Stored, encoding: Encoding, size: int) -> tuple[str, int]:
        assert stored.marks is not None and stored.patterns is not None
        above, count = self.stream(stored.marks, np.arange(2, dtype=np.uint8).reshape(-1, 1))
        m = encoding.m
        used = np.arange(1, 1 << m, dtype=np.int32).reshape(-1, 1)
        patterns = self._scattered(above, count, stored.patterns, used)
        bits = (np.arange(1 << m).reshape(-1, 1) >> np.arange(m) & 1).astype(np.uint8)
        mask = self.builder.op("Gather", [self.builder.constant(bits), patterns], axis=0)
        return self._weights(mask, m * count, stored, encoding), m * count

    def _sets(self, stored: packing.Stored, encoding: Encoding, size: int) -> tuple[str, int]:
        assert stored.marks is not None
        b, groups = self.builder, size // encoding.m
        index = self.exactly(stored.marks, encoding.positions().astype(np.int32), [groups, encoding.n])
        values = self.exactly(stored.values, _alphabet(encoding, np.int32), [groups, encoding.n])
        scattered = b.op("ScatterElements", [self._zeros([groups, encoding.m]), index, values], axis=1)
        return b.cast(scattered, INT8), size

    def _weights(self, mask: str, count: int, stored: packing.Stored, encoding: Encoding) -> str:
        return self.builder.cast(self._scattered(mask, count, stored.values, _alphabet(encoding, np.int32)), INT8)

    def _scattered(self, mask: str, count: int, codes: NDArray[np.int64], table: NDArray[np.int32]) -> str:
        """int32 [1, count]: where the mask is 1 the stream's values in order, 0 elsewhere.

        NonZero's size is written down: onnxruntime 1.31 folds only what it can tell the size of. Integers of 32
        bits, because OpenVINO 2026.4 folds no ScatterElements of narrower ones.
        """
        b = self.builder
        where = b.op("NonZero", [self._flat(mask)])
        b.shape(where, TensorProto.INT64, [1, codes.size])
        values = self.exactly(codes, table, [1, codes.size])
        return b.op("ScatterElements", [self._zeros([1, count]), where, values], axis=1)

    def _zeros(self, shape: list[int]) -> str:
        value = helper.make_tensor("", INT32, [1], [0])
        return self.builder.op("ConstantOfShape", [self.builder.ints(shape)], value=value)

    # --- tensors ----------------------------------------------------------------------------------------------

    def _split(
        self, pooled: str, count: int, tensors: dict[str, NDArray[np.int8]], encoding: Encoding
    ) -> dict[str, str]:
        """Cut the pool into its tensors; the padding falls off as one more, unused, piece."""
        sizes = [values.size for values in tensors.values()]
        if count > sum(sizes):
            sizes.append(count - sum(sizes))
        parts = [pooled]
        if len(sizes) > 1:
            parts = self.builder.ops("Split", [self._flat(pooled), self.builder.ints(sizes)], outputs=len(sizes))
        return {name: self._shaped(part, tensors[name].shape, encoding) for part, name in zip(parts, tensors)}

    def _shaped(self, tensor: str, shape: tuple[int, ...], encoding: Encoding) -> str:
        b = self.builder
        if not encoding.channels_last:
            return b.op("Reshape", [tensor, b.ints(shape)])
        moved = b.op("Reshape", [tensor, b.ints([shape[0], *shape[2:], shape[1]])])
        rank = len(shape)
        return b.op("Transpose", [moved], perm=[0, rank - 1, *range(1, rank - 1)])


def _alphabet(encoding: Encoding, kind: Any) -> NDArray[Any]:
    """[radix, 1]: what the digits stand for, headroom included."""
    return (encoding.alphabet() << encoding.headroom).astype(kind).reshape(-1, 1)
