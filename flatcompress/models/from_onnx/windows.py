"""Pooling, resizing and the padding of windows: ONNX's settings as torch's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flatcompress.errors import UserError
from flatcompress.models.from_onnx.operators import Operator, ints

_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_GLOBAL_AVERAGE = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
_GLOBAL_MAX = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


def window_pads(a: dict[str, Any], size: Sequence[int], kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """Begin and end of the padding of every spatial dimension; ``size`` is looked at for auto_pad alone."""
    rank = len(kernel)
    mode = a.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        pads = list(a.get("pads") or [0] * 2 * rank)
        return pads[:rank], pads[rank:]
    if mode == "VALID":
        return [0] * rank, [0] * rank
    begins, ends = [], []
    for length, k, s, d in zip(size, kernel, a.get("strides") or [1] * rank, a.get("dilations") or [1] * rank):
        total = max(0, (-(-length // s) - 1) * s + (k - 1) * d + 1 - length)
        first = total // 2 if mode == "SAME_UPPER" else total - total // 2
        begins.append(first)
        ends.append(total - first)
    return begins, ends


def padded(x: Tensor, begins: Sequence[int], ends: Sequence[int], value: float = 0.0) -> Tensor:
    """x with its spatial dimensions padded."""
    return F.pad(x, [n for pair in reversed(list(zip(begins, ends))) for n in pair], value=value)


def _max_pool(a: dict[str, Any], x: Tensor) -> Tensor:
    kernel = list(a["kernel_shape"])
    begins, ends = window_pads(a, x.shape[2:], kernel)
    if begins != ends or any(2 * p > k for p, k in zip(begins, kernel)):
        x, begins = padded(x, begins, ends, -math.inf), [0] * len(kernel)
    given = (a.get("strides") or [1] * len(kernel), begins, a.get("dilations") or 1, bool(a.get("ceil_mode")))
    return _MAX[len(kernel)](x, kernel, *given)


def _average_pool(a: dict[str, Any], x: Tensor) -> Tensor:
    kernel = list(a["kernel_shape"])
    begins, ends = window_pads(a, x.shape[2:], kernel)
    counted = bool(a.get("count_include_pad"))
    if any(d != 1 for d in a.get("dilations") or []):
        raise UserError("is an average pooling with dilations, which torch has not.")
    if begins != ends:
        if not counted:
            weights = padded(torch.ones_like(x), begins, ends)
            share = _AVERAGE[len(kernel)](weights, kernel, a.get("strides") or [1] * len(kernel))
            return _AVERAGE[len(kernel)](padded(x, begins, ends), kernel, a.get("strides") or [1] * len(kernel)) / share
        x, begins = padded(x, begins, ends), [0] * len(kernel)
    steps = a.get("strides") or [1] * len(kernel)
    return _AVERAGE[len(kernel)](x, kernel, steps, begins, bool(a.get("ceil_mode")), counted)


def _global(table: dict[int, Any]) -> Operator:
    def run(a: dict[str, Any], x: Tensor) -> Tensor:
        return table[x.dim() - 2](x, 1)

    return run


def _resize(a: dict[str, Any], x: Tensor, roi: Any = None, scales: Any = None, sizes: Any = None) -> Tensor:
    """The modes that F.interpolate has: nearest, linear and cubic, in the usual coordinates."""
    if a["op"] == "Upsample":
        roi, scales = None, (scales if scales is not None else roi if roi is not None else np.asarray(a["scales"]))
    wanted = _sizes(a, x, scales, sizes)
    mode, where = a.get("mode", "nearest"), a.get("coordinate_transformation_mode", "half_pixel")
    if a["op"] == "Upsample":
        where = "asymmetric" if mode == "nearest" else "half_pixel"
    if mode == "nearest":
        return F.interpolate(x, wanted, mode="nearest" if where == "asymmetric" else "nearest-exact")
    if where not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise UserError(f"is a Resize with coordinates {where!r}; torch has half_pixel and align_corners.")
    name = ("linear", "bilinear", "trilinear")[x.dim() - 3] if mode == "linear" else "bicubic"
    smooth = {"antialias": True} if a.get("antialias") else {}
    return F.interpolate(x, wanted, mode=name, align_corners=where == "align_corners", **smooth)


def _sizes(a: dict[str, Any], x: Tensor, scales: Any, sizes: Any) -> list[Any]:
    if sizes is not None and len(ints(sizes)):
        return ints(sizes)[-(x.dim() - 2) :]
    factors = np.asarray(scales.detach().cpu() if isinstance(scales, Tensor) else scales, np.float64).reshape(-1)
    return [_scaled(size, float(f)) for size, f in zip(x.shape[2:], factors[-(x.dim() - 2) :])]


def _scaled(size: Any, factor: float) -> Any:
    return size * int(factor) if float(factor).is_integer() else int(size * factor + 1e-6)


WINDOWS: dict[str, Operator] = {
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global(_GLOBAL_AVERAGE),
    "GlobalMaxPool": _global(_GLOBAL_MAX),
    "Resize": _resize,
    "Upsample": _resize,
}
