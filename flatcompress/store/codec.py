"""Nested training state <-> (JSON skeleton, named tensors), so that nothing is ever pickled.

`encode` walks dicts, lists, tuples and scalars; tensors and arrays are taken out under generated names and go to a
safetensors file, everything else becomes strict JSON. What JSON cannot say is an object with the one-letter key "$"
that names its type: ``{"$": "tuple", "v": [...]}``. `decode` is the inverse, bit for bit, and treats its input as
hostile: only the types below can come out of it.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from flatcompress.errors import UserError

TAG = "$"
_EXACT = 2**53  # beyond this a JSON reader that uses doubles would round
_MAX_DEPTH = 200
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_ARRAYS = {str(np.dtype(c)) for c in "?bBhHiIqQefdFD"}


def encode(value: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """``(skeleton, tensors)`` of a nested state; tensors are contiguous CPU tensors that share no memory.

    A tensor object met twice is stored once and comes back as one object. TypeError names the path of a value of a
    type that cannot be stored.
    """
    encoder = _Encoder()
    return encoder.encode(value, "state", 0), encoder.tensors


def decode(skeleton: Any, tensors: dict[str, torch.Tensor], where: str = "state") -> Any:
    """Inverse of `encode`. UserError when the skeleton is damaged or names a tensor that is not there."""
    return _Decoder(tensors).decode(skeleton, where, 0)


def storable(tensor: torch.Tensor, where: str = "tensor") -> torch.Tensor:
    """``tensor`` as safetensors can write it: dense, on the CPU, contiguous. TypeError when that is impossible."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise TypeError(f"{where}: a {tensor.layout} tensor on {tensor.device.type} cannot be stored in a checkpoint")
    tensor = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    owns_all = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if owns_all else tensor.clone()  # a slice of something larger


def unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`storable` tensors of which no two share memory (tied weights are written twice; safetensors refuses sharing)."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        kept = storable(tensor, name)
        pointer = kept.untyped_storage().data_ptr()
        if kept.numel() == 0 or pointer in seen:
            kept = kept.clone()
        seen.add(kept.untyped_storage().data_ptr())
        result[name] = kept
    return result


class _Encoder:
    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._names: dict[int, str] = {}
        self._alive: list[torch.Tensor] = []  # or an id could be given to a second tensor
        self._storages: set[int] = set()

    def encode(self, value: Any, path: str, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise TypeError(f"{path[:200]}: nested deeper than {_MAX_DEPTH}")
        if value is None or isinstance(value, bool) or type(value) is str:
            return value
        if type(value) is int:
            return value if abs(value) <= _EXACT else _tag("int", hex(value))
        if type(value) is float:
            return value if math.isfinite(value) else _tag("float", repr(value))
        if isinstance(value, torch.Tensor):
            return _tag("tensor", self._tensor(value, path))
        for kind, matches, body in _ENCODERS:
            if matches(value):
                return _tag(kind, body(self, value, path, depth + 1))
        if type(value) is list:
            return self.items(value, path, depth + 1)
        if type(value) is dict:
            return self._dict(value, path, depth + 1)
        raise TypeError(f"{path[:200]}: a {type(value).__name__} cannot be stored in a checkpoint")

    def items(self, values: Any, path: str, depth: int) -> list[Any]:
        return [self.encode(item, f"{path}[{i}]", depth) for i, item in enumerate(values)]

    def pairs(self, value: dict[Any, Any], path: str, depth: int) -> list[list[Any]]:
        return [[self.encode(k, f"{path} key", depth), self.encode(v, f"{path}.{k}", depth)] for k, v in value.items()]

    def _dict(self, value: dict[Any, Any], path: str, depth: int) -> Any:
        if TAG in value or any(type(key) is not str for key in value):
            return _tag("dict", self.pairs(value, path, depth))
        return {key: self.encode(item, f"{path}.{key}", depth) for key, item in value.items()}

    def _tensor(self, value: torch.Tensor, path: str) -> str:
        if id(value) in self._names:
            return self._names[id(value)]
        stored = storable(value, path)
        if stored.untyped_storage().data_ptr() in self._storages or stored.numel() == 0:
            stored = stored.clone()
        self._storages.add(stored.untyped_storage().data_ptr())
        self._alive.append(value)
        name = self._names[id(value)] = f"t{len(self.tensors)}"
        self.tensors[name] = stored
        return name

    def array(self, value: np.ndarray | np.generic, path: str) -> dict[str, Any]:
        array = np.asarray(value)
        if str(array.dtype) not in _ARRAYS:
            raise TypeError(f"{path[:200]}: a numpy array of {array.dtype} cannot be stored in a checkpoint")
        flat = torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8) if array.size else torch.empty(0).byte()
        return {"dtype": str(array.dtype), "shape": list(array.shape), "data": self._tensor(flat, path)}


def _tag(kind: str, body: Any) -> dict[str, Any]:
    return {TAG: kind, "v": body}


_Body = Callable[[_Encoder, Any, str, int], Any]
_ENCODERS: list[tuple[str, Callable[[Any], bool], _Body]] = [
    ("numpy", lambda v: isinstance(v, np.generic), lambda e, v, p, d: e.array(v, p)),
    ("ndarray", lambda v: isinstance(v, np.ndarray), lambda e, v, p, d: e.array(v, p)),
    ("bytes", lambda v: isinstance(v, bytes), lambda e, v, p, d: base64.b64encode(v).decode()),
    ("dtype", lambda v: isinstance(v, torch.dtype), lambda e, v, p, d: str(v).removeprefix("torch.")),
    ("device", lambda v: isinstance(v, torch.device), lambda e, v, p, d: str(v)),
    ("size", lambda v: isinstance(v, torch.Size), lambda e, v, p, d: list(v)),
    ("complex", lambda v: type(v) is complex, lambda e, v, p, d: e.items([v.real, v.imag], p, d)),
    ("tuple", lambda v: type(v) is tuple, lambda e, v, p, d: e.items(v, p, d)),
    ("counter", lambda v: type(v) is Counter, lambda e, v, p, d: e.pairs(v, p, d)),
    ("ordered", lambda v: type(v) is OrderedDict, lambda e, v, p, d: e.pairs(v, p, d)),
    ("deque", lambda v: type(v) is deque, lambda e, v, p, d: [v.maxlen, e.items(v, p, d)]),
    ("set", lambda v: type(v) is set, lambda e, v, p, d: e.items(sorted(v, key=repr), p, d)),
]


class _Decoder:
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def decode(self, value: Any, where: str, depth: int) -> Any:
        if depth > _MAX_DEPTH * 2:
            raise UserError(f"{where[:200]}: nested too deep.")
        if isinstance(value, list):
            return self.items(value, where, depth + 1)
        if not isinstance(value, dict):
            return value
        if TAG not in value:
            return {key: self.decode(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
        decoder = _DECODERS.get(value[TAG]) if isinstance(value[TAG], str) else None
        if decoder is None or "v" not in value:
            raise UserError(f"{where[:200]}: unknown state type {str(value[TAG])[:40]!r}.")
        try:
            return decoder(self, value["v"], where, depth + 1)
        except UserError:
            raise
        except (TypeError, ValueError, KeyError, IndexError, OverflowError, AttributeError, RuntimeError) as error:
            raise UserError(f"{where[:200]}: damaged {value[TAG]} ({str(error)[:200]}).") from None

    def items(self, values: Any, where: str, depth: int) -> list[Any]:
        if not isinstance(values, list):
            raise ValueError("a list is needed")
        return [self.decode(item, f"{where}[{i}]", depth) for i, item in enumerate(values)]

    def pairs(self, values: Any, where: str, depth: int) -> list[tuple[Any, Any]]:
        return [(k, v) for k, v in self.items(values, where, depth)]

    def array(self, body: dict[str, Any]) -> np.ndarray:
        if body["dtype"] not in _ARRAYS:
            raise ValueError(f"no such array type {str(body['dtype'])[:40]!r}")
        data = self.tensors[body["data"]].contiguous().numpy().tobytes()
        return np.frombuffer(data, dtype=body["dtype"]).reshape(tuple(body["shape"])).copy()


def _float(text: str) -> float:
    if text not in ("nan", "inf", "-inf"):
        raise ValueError("a special float is nan, inf or -inf")
    return float(text)


_DECODERS: dict[str, Callable[[_Decoder, Any, str, int], Any]] = {
    "int": lambda d, v, w, n: int(v, 16),
    "float": lambda d, v, w, n: _float(v),
    "tensor": lambda d, v, w, n: d.tensors[v],
    "numpy": lambda d, v, w, n: d.array(v)[()],
    "ndarray": lambda d, v, w, n: d.array(v),
    "bytes": lambda d, v, w, n: base64.b64decode(v, validate=True),
    "dtype": lambda d, v, w, n: _DTYPES[v],
    "device": lambda d, v, w, n: torch.device(v),
    "size": lambda d, v, w, n: torch.Size(v),
    "complex": lambda d, v, w, n: complex(*d.items(v, w, n)),
    "tuple": lambda d, v, w, n: tuple(d.items(v, w, n)),
    "dict": lambda d, v, w, n: dict(d.pairs(v, w, n)),
    "counter": lambda d, v, w, n: Counter(dict(d.pairs(v, w, n))),
    "ordered": lambda d, v, w, n: OrderedDict(d.pairs(v, w, n)),
    "deque": lambda d, v, w, n: deque(d.items(v[1], w, n), maxlen=v[0]),
    "set": lambda d, v, w, n: set(d.items(v, w, n)),
}
