"""What a certificate needs to be repeated elsewhere: inputs, labels and the reference's outputs, as plain tensors.

The file is safetensors: a JSON header and raw numbers, nothing that could run. It is read back with limits on every
size, because it may come from anywhere.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from flatcompress.errors import UserError

BYTES = 4 << 20  # of inputs kept by default: enough for 4000 digits or 6 photographs
MOST_BYTES = 1 << 30
_HEADER = 1 << 20
_INPUT, _FIXED = "input:", "fixed:"
_KINDS = ("F32", "F16", "I64", "I32", "U8", "BOOL")
_LABELS = ("I64", "F32")


@dataclass(frozen=True)
class Evidence:
    """reference: float32 [N, ...]; label: int64 or float32 [N, ...] or None. input: float32 or int64 [N, ...], or of a
    file with several inputs a dictionary {name: array [N, ...]}; fixed: those without a batch dimension, by name."""

    input: NDArray[np.float32] | dict[str, NDArray[Any]]
    reference: NDArray[np.float32]
    label: NDArray[Any] | None = None
    fixed: dict[str, NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.reference.shape[0])

    @property
    def inputs(self) -> dict[str, NDArray[Any]]:
        """{name: array [N, ...]}; the only input is called ``input``."""
        return self.input if isinstance(self.input, dict) else {"input": self.input}

    def capped(self, limit: int = BYTES) -> Evidence:
        """Samples spread evenly over the whole set, as many as fit in ``limit`` bytes of input, at least one."""
        each = max(1, sum(value[:1].nbytes for value in self.inputs.values()))
        count = min(len(self), max(1, limit // each))
        chosen = np.linspace(0, len(self) - 1, count).round().astype(np.int64)
        several = {name: value[chosen] for name, value in self.inputs.items()}
        few = several if isinstance(self.input, dict) else several["input"]
        return Evidence(
            few, self.reference[chosen], None if self.label is None else self.label[chosen], dict(self.fixed)
        )

    def parts(self, size: int = 64) -> list[dict[str, NDArray[Any]]]:
        """What a session is fed, ``size`` samples at a time."""
        starts = range(0, len(self), size)
        return [{n: v[i : i + size] for n, v in self.inputs.items()} | self.fixed for i in starts]

    def to_bytes(self) -> bytes:
        """The safetensors file."""
        tensors: dict[str, NDArray] = {"reference": self.reference}
        if isinstance(self.input, dict):
            tensors |= {_INPUT + name: value for name, value in self.input.items()}
        else:
            tensors["input"] = self.input
        tensors |= {_FIXED + name: value for name, value in self.fixed.items()}
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
    several = {name.removeprefix(_INPUT): value for name, value in tensors.items() if name.startswith(_INPUT)}
    fixed = {name.removeprefix(_FIXED): value for name, value in tensors.items() if name.startswith(_FIXED)}
    found = Evidence(tensors.get("input", several), tensors["reference"], label, fixed)
    rows = {
        v.shape[0] if v.ndim else 0
        for v in (*found.inputs.values(), found.reference, *([] if label is None else [label]))
    }
    if len(rows) != 1 or len(found) == 0 or found.reference.ndim < 1:
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
    kind = "I64" if types.get("input") == "I64" else "F32"  # token numbers, or values
    wanted = {"input": kind, "reference": "F32"} | ({"label": types["label"]} if types.get("label") in _LABELS else {})
    given = {name: kind for name, kind in types.items() if name.startswith((_INPUT, _FIXED))}
    if any(name.startswith(_INPUT) for name in given) and "input" not in types:
        del wanted["input"]
    strange = any(kind not in _KINDS for kind in given.values()) or (given and "input" in wanted)
    if strange or {n: k for n, k in types.items() if n not in given} != wanted:
        raise UserError(f"{path}: evidence holds {wanted}; found {types}.")
