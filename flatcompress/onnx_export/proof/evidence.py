"""What a certificate needs to be repeated elsewhere: inputs, labels and the reference's outputs, as plain tensors.

The file is safetensors: a JSON header and raw numbers, nothing that could run. It is read back with limits on every
size, because it may come from anywhere.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from flatcompress.errors import UserError

BYTES = 4 << 20  # of inputs kept by default: enough for 4000 digits or 6 photographs
MOST_BYTES = 1 << 30
_HEADER = 1 << 20
_TYPES = {"input": "F32", "label": "I64", "reference": "F32"}


@dataclass(frozen=True)
class Evidence:
    """input: float32 [N, ...]; label: int64 [N] or None; reference: float32 [N, classes]."""

    input: NDArray[np.float32]
    reference: NDArray[np.float32]
    label: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return int(self.input.shape[0])

    def capped(self, limit: int = BYTES) -> Evidence:
        """Samples spread evenly over the whole set, as many as fit in ``limit`` bytes of input, at least one."""
        each = max(1, self.input[:1].nbytes)
        count = min(len(self), max(1, limit // each))
        chosen = np.linspace(0, len(self) - 1, count).round().astype(np.int64)
        return Evidence(self.input[chosen], self.reference[chosen], None if self.label is None else self.label[chosen])

    def to_bytes(self) -> bytes:
        """The safetensors file."""
        tensors: dict[str, NDArray] = {"input": self.input, "reference": self.reference}
        if self.label is not None:
            tensors["label"] = self.label
        return save({name: np.ascontiguousarray(value) for name, value in tensors.items()})


def read(path: Path) -> Evidence:
    """Read evidence back. UserError when it is damaged, too large, or something else altogether."""
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise UserError(f"{path}: {size} bytes of evidence; at most {MOST_BYTES} are read.")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None
    _check_header(path, data)
    try:
        tensors = load(data)
    except Exception as error:  # safetensors raises its own type, and others for strange headers
        raise UserError(f"{path}: not a safetensors file ({error}).") from None
    label = tensors.get("label")
    found = Evidence(tensors["input"], tensors["reference"], label)
    rows = {len(found), found.reference.shape[0], len(found) if label is None else label.shape[0]}
    if len(rows) != 1 or len(found) == 0 or found.reference.ndim < 2:
        raise UserError(f"{path}: its tensors do not belong together (samples: {sorted(rows)}).")
    return found


def _check_header(path: Path, data: bytes) -> None:
    """Names and types before anything is allocated."""
    if len(data) < 8 or not 2 <= (length := struct.unpack("<Q", data[:8])[0]) <= min(_HEADER, len(data) - 8):
        raise UserError(f"{path}: not a safetensors file (its header is cut off or too long).")
    try:
        header = json.loads(data[8 : 8 + length])
        types = {name: row["dtype"] for name, row in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path}: not a safetensors file (its header is not JSON).") from None
    wanted = {name: kind for name, kind in _TYPES.items() if name != "label" or "label" in types}
    if types != wanted:
        raise UserError(f"{path}: evidence holds {wanted}; found {types}.")
