"""ONNX's operators that move, cut, repeat or place values, as torch; sizes may be lists (see `operators`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flatcompress.errors import UserError
from flatcompress.models.from_onnx.operators import Operator, axes_of, ints, tensor

_RANK = 8


def _shape(a: dict[str, Any], x: Any) -> list[Any]:
    shape = [len(x)] if isinstance(x, list) else list(x.shape)
    return shape[a.get("start", 0) : a.get("end", len(shape))]


def _size(a: dict[str, Any], x: Tensor) -> list[Any]:
    return [x.numel()]


def _reshape(a: dict[str, Any], x: Any, sizes: Any = None) -> Any:
    wanted = ints(sizes) if sizes is not None else list(a["shape"])
    if isinstance(x, list):
        return x
    if not a.get("allowzero"):
        wanted = [x.shape[i] if isinstance(s, int) and s == 0 else s for i, s in enumerate(wanted)]
    if a.get("batch") and wanted and wanted[0] == a["batch"]:
        wanted[0] = x.shape[0]  # a size that the file fixed because its batch was fixed
    if len(wanted) == 2 and x.dim() > 2 and _is(wanted[0], (-1, x.shape[0])) and _is(wanted[1], (-1, x[0].numel())):
        return x.flatten(1)
    return x.reshape(wanted)


def _is(size: Any, wanted: tuple[Any, ...]) -> bool:
    return (isinstance(size, int) and size in [w for w in wanted if isinstance(w, int)]) or size is wanted[1]


def _flatten(a: dict[str, Any], x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    axis += x.dim() if axis < 0 else 0
    if axis == x.dim():
        return x.reshape(-1, 1)
    if axis == 1:
        return x.flatten(1) if x.dim() > 2 else x
    return x.reshape(1, -1) if axis == 0 else x.flatten(0, axis - 1).flatten(1)


def _squeeze(a: dict[str, Any], x: Any, axes: Any = None) -> Any:
    if isinstance(x, list):
        return x
    chosen = axes_of(a, axes)
    return tensor(x).squeeze() if chosen is None else tensor(x).squeeze(tuple(chosen))


def _unsqueeze(a: dict[str, Any], x: Any, axes: Any = None) -> Any:
    if isinstance(x, list):
        return x
    made = tensor(x)
    chosen = axes_of(a, axes) or []
    for axis in sorted(d % (made.dim() + len(chosen)) for d in chosen):
        made = made.unsqueeze(axis)
    return made


def _transpose(a: dict[str, Any], x: Tensor) -> Tensor:
    return x.permute(a.get("perm", list(range(x.dim()))[::-1]))


def _concat(a: dict[str, Any], *parts: Any) -> Any:
    if any(isinstance(p, list) for p in parts) and not any(isinstance(p, Tensor) for p in parts):
        return [v for part in parts for v in ints(part)]
    return torch.cat([tensor(p) for p in parts], a["axis"])


def _slice(a: dict[str, Any], x: Any, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None) -> Any:
    begin = ints(starts) if starts is not None else list(a["starts"])
    end = ints(ends) if ends is not None else list(a["ends"])
    over = axes_of(a, axes) or list(range(len(begin)))
    by = ints(steps) if steps is not None else [1] * len(begin)
    if isinstance(x, list):
        return x[slice(begin[0], end[0], by[0])]
    made = tensor(x)
    for first, last, axis, step in zip(begin, end, over, by):
        if step < 0:
            made, first, last, step = made.flip(axis), -first - 1, -last - 1, -step
            first, last = max(first, 0), min(last, (1 << 63) - 1) if last >= 0 else (1 << 63) - 1
        made = torch.ops.aten.slice(
            made, axis, first, min(last, (1 << 63) - 1) if isinstance(last, int) else last, step
        )
    return made


def _split(a: dict[str, Any], x: Any, sizes: Any = None) -> Any:
    axis = a.get("axis", 0)
    wanted = ints(sizes) if sizes is not None else a.get("split")
    if isinstance(x, list):
        raise UserError("splits sizes, which has no torch form here.")
    if wanted:
        return x.split(list(wanted), axis)
    return x.chunk(a.get("num_outputs", a["outputs"]), axis)


def _gather(a: dict[str, Any], x: Any, index: Any) -> Any:
    axis = a.get("axis", 0)
    if isinstance(x, list):
        chosen = ints(index)
        return [x[i] for i in chosen]
    made = tensor(x, index)
    if isinstance(index, Tensor):
        where = torch.where(index < 0, index + made.shape[axis], index)
        if where.dim() == 1:
            return made.index_select(axis, where)
        return made[(slice(None),) * (axis % made.dim()) + (where.long(),)]
    places = np.asarray(index if not isinstance(index, list) else ints(index))
    if places.ndim == 0:
        return made.select(axis, int(places))
    return made[(slice(None),) * (axis % made.dim()) + (torch.from_numpy(places).to(made.device).long(),)]


def _gather_elements(a: dict[str, Any], x: Tensor, index: Any) -> Tensor:
    return torch.gather(x, a.get("axis", 0), tensor(index, x))


def _gather_nd(a: dict[str, Any], x: Tensor, index: Any) -> Tensor:
    if a.get("batch_dims"):
        raise UserError("is a GatherND with batch_dims, which has no torch form here.")
    return x[tuple(tensor(index, x).unbind(-1))]


def _scatter_elements(a: dict[str, Any], x: Tensor, index: Any, updates: Any) -> Tensor:
    reduction = a.get("reduction", "none")
    where, values = tensor(index, x), tensor(updates, x)
    if reduction == "none":
        return x.scatter(a.get("axis", 0), where, values)
    name = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[reduction]
    return x.scatter_reduce(a.get("axis", 0), where, values, name)


def _expand(a: dict[str, Any], x: Any, sizes: Any) -> Tensor:
    made, wanted = tensor(x), ints(sizes)
    wanted = [1] * (made.dim() - len(wanted)) + wanted
    padded = [1] * (len(wanted) - made.dim()) + list(made.shape)
    return made.expand([-1 if isinstance(s, int) and s == 1 and p != 1 else s for s, p in zip(wanted, padded)])


def _tile(a: dict[str, Any], x: Tensor, times: Any) -> Tensor:
    return x.repeat(ints(times))


def _constant_of_shape(a: dict[str, Any], sizes: Any) -> Any:
    value, wanted = a.get("value", np.zeros(1, np.float32)), ints(sizes)
    whole = np.asarray(value).dtype == np.int64
    if whole and len(wanted) == 1 and isinstance(wanted[0], int) and wanted[0] <= _RANK:  # sizes to calculate with
        return [int(np.asarray(value).reshape(-1)[0])] * wanted[0]
    made = torch.from_numpy(np.atleast_1d(value))
    return torch.full(tuple(ints(sizes)), made[0].item(), dtype=made.dtype)


def _range(a: dict[str, Any], start: Any, limit: Any, step: Any) -> Any:
    return torch.arange(*(ints(v)[0] for v in (start, limit, step)))


def _one_hot(a: dict[str, Any], index: Tensor, depth: Any, values: Any) -> Tensor:
    off, on = tensor(values)[0], tensor(values)[1]
    if a.get("axis", -1) != -1:
        raise UserError("is a OneHot along another axis than the last.")
    return torch.where(index.unsqueeze(-1) == torch.arange(ints(depth)[0]), on, off)


def _trilu(a: dict[str, Any], x: Tensor, k: Any = None) -> Tensor:
    diagonal = 0 if k is None else ints(k)[0]
    return x.triu(diagonal) if a.get("upper", 1) else x.tril(diagonal)


def _pad(a: dict[str, Any], x: Tensor, pads: Any = None, value: Any = None, axes: Any = None) -> Tensor:
    amounts = ints(pads) if pads is not None else list(a["pads"])
    over = [d % x.dim() for d in ints(axes)] if axes is not None else list(range(x.dim()))
    mode = {"edge": "replicate", "wrap": "circular"}.get(a.get("mode", "constant"), a.get("mode", "constant"))
    pairs = {axis: (amounts[i], amounts[i + len(over)]) for i, axis in enumerate(over)}
    flat = [amount for axis in range(x.dim() - 1, -1, -1) for amount in pairs.get(axis, (0, 0))]
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    fill = a.get("value", 0.0) if value is None else float(np.asarray(tensor(value).detach()).reshape(-1)[0])
    return F.pad(x, flat, mode, fill) if mode == "constant" else F.pad(x, flat, mode)


MOVES: dict[str, Operator] = {
    "Shape": _shape,
    "Size": _size,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterElements": _scatter_elements,
    "Expand": _expand,
    "Tile": _tile,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "OneHot": _one_hot,
    "Trilu": _trilu,
    "Pad": _pad,
}
