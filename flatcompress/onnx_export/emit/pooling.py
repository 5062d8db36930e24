"""Emitters for pooling, resizing and sampling of images and sequences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import fx

from flatcompress.errors import UserError
from flatcompress.onnx_export.emit.values import axes_input, axis_of, fixed, rank_of, several, shape_of
from flatcompress.onnx_export.emit.writer import FunctionEmitter, Writer
from flatcompress.onnx_export.lower.lowering import function_path, is_global_pool

aten = torch.ops.aten


def _windows(size: int, wanted: int) -> list[tuple[int, int]]:
    """Begin and end of every window of torch's adaptive pooling."""
    return [(i * size // wanted, -(-(i + 1) * size // wanted)) for i in range(wanted)]


def _spatial(x: fx.Node, rank: int) -> list[int]:
    """The sizes of the last ``rank`` dimensions, which must not be left open."""
    first = rank_of(x) - rank
    return [fixed(x, axis, "adaptive pooling to several values") for axis in range(first, rank_of(x))]


def _wanted(x: fx.Node, size: Any, rank: int) -> list[int]:
    """The sizes that adaptive pooling is asked for; None keeps one."""
    return [shape_of(x)[rank_of(x) - rank + i] if s is None else s for i, s in enumerate(several(size, rank))]


def _batched(w: Writer, x: fx.Node, rank: int) -> tuple[str, bool]:
    """torch also pools [C, ...] without a batch; ONNX wants one."""
    if rank_of(x) == rank + 2:
        return w.tensor(x), False
    return w.builder.op("Unsqueeze", [w.tensor(x), w.builder.ints([0])]), True


def _unbatched(w: Writer, made: str, added: bool) -> str:
    return w.builder.op("Squeeze", [made, w.builder.ints([0])]) if added else made


def _adaptive_avg(rank: int) -> FunctionEmitter:
    """One window, even windows, or else a matrix of means per dimension: windows of torch overlap and differ."""

    def emit(w: Writer, node: fx.Node, x: fx.Node, size: Any) -> str:
        wanted = _wanted(x, size, rank)
        if is_global_pool(node):
            return w.builder.op("GlobalAveragePool", [w.tensor(x)], name=function_path(node))
        if all(s == 1 for s in wanted):
            axes = list(range(rank_of(x) - rank, rank_of(x)))
            return axes_input(w, "ReduceMean", w.tensor(x), axes, 1)
        spatial = _spatial(x, rank)
        if spatial == wanted:
            return w.tensor(x)
        if not any(a % b for a, b in zip(spatial, wanted)):
            window = [a // b for a, b in zip(spatial, wanted)]
            source, added = _batched(w, x, rank)
            return _unbatched(w, w.builder.op("AveragePool", [source], kernel_shape=window, strides=window), added)
        return _mean_matrices(w, x, spatial, wanted)

    return emit


def _mean_matrices(w: Writer, x: fx.Node, spatial: list[int], wanted: list[int]) -> str:
    made, rank = w.tensor(x), rank_of(x)
    for index, (size, count) in enumerate(zip(spatial, wanted)):
        matrix = np.zeros((size, count))
        for column, (begin, end) in enumerate(_windows(size, count)):
            matrix[begin:end, column] = 1 / (end - begin)
        axis = rank - len(spatial) + index
        made = _along(w, made, w.builder.constant(matrix.astype(w.profile.floats)), axis, rank)
    return made


def _along(w: Writer, x: str, matrix: str, axis: int, rank: int) -> str:
    """x times a matrix along one axis."""
    if axis == rank - 1:
        return w.builder.op("MatMul", [x, matrix])
    order = list(range(rank))
    order[axis], order[-1] = order[-1], order[axis]
    product = w.builder.op("MatMul", [w.builder.op("Transpose", [x], perm=order), matrix])
    return w.builder.op("Transpose", [product], perm=order)


def _adaptive_max(rank: int) -> FunctionEmitter:
    """torch returns (values, indices); only the values have a form."""

    def emit(w: Writer, node: fx.Node, x: fx.Node, size: Any) -> list[str]:
        wanted = _wanted(x, size, rank)
        source, added = _batched(w, x, rank)
        if all(s == 1 for s in wanted):
            return [_unbatched(w, w.builder.op("GlobalMaxPool", [source]), added)]
        spatial = _spatial(x, rank)
        if not any(a % b for a, b in zip(spatial, wanted)):
            window = [a // b for a, b in zip(spatial, wanted)]
            return [_unbatched(w, w.builder.op("MaxPool", [source], kernel_shape=window, strides=window), added)]
        made = source
        for index, (length, count) in enumerate(zip(spatial, wanted)):
            made = _window_maxima(w, made, 2 + index, _windows(length, count))
        return [_unbatched(w, made, added)]

    return emit


def _window_maxima(w: Writer, x: str, axis: int, windows: list[tuple[int, int]]) -> str:
    b, parts = w.builder, []
    for begin, end in windows:
        part = b.op("Slice", [x, b.ints([begin]), b.ints([end]), b.ints([axis])])
        parts.append(axes_input(w, "ReduceMax", part, [axis], 1))
    return b.op("Concat", parts, axis=axis)


def _max_pool(rank: int, indices: bool = False) -> FunctionEmitter:
    def emit(
        w: Writer,
        node: fx.Node,
        x: fx.Node,
        kernel: Any,
        stride: Any = (),
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> Any:
        written: dict[str, Any] = {"kernel_shape": several(kernel, rank), "strides": several(stride or kernel, rank)}
        if any(pads := several(padding, rank) * 2):
            written["pads"] = pads
        if any(d != 1 for d in several(dilation, rank)):
            written["dilations"] = several(dilation, rank)
        if ceil_mode:
            written["ceil_mode"] = 1
        source, added = _batched(w, x, rank)
        made = _unbatched(w, w.builder.op("MaxPool", [source], **written), added)
        return [made] if indices else made

    return emit


def _avg_pool(rank: int) -> FunctionEmitter:
    def emit(
        w: Writer,
        node: fx.Node,
        x: fx.Node,
        kernel: Any,
        stride: Any = (),
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> str:
        window, steps, pads = (several(v, rank) for v in (kernel, stride or kernel, padding))
        source, added = _batched(w, x, rank)
        if ceil_mode:
            made = _ceil_average(w, source, _spatial(x, rank), (window, steps, pads), count_include_pad)
        else:
            written: dict[str, Any] = {"kernel_shape": window, "strides": steps}
            if any(pads):
                written |= {
                    "pads": pads * 2,
                    "count_include_pad": int(count_include_pad or divisor_override is not None),
                }
            made = w.builder.op("AveragePool", [source], **written)
        if divisor_override is not None:
            if ceil_mode:
                raise UserError("average pooling with ceil_mode and its own divisor has no ONNX form here.")
            made = w.builder.op("Mul", [made, w.number(math.prod(window) / divisor_override)])
        return _unbatched(w, made, added)

    return emit


def _ceil_average(w: Writer, x: str, spatial: list[int], how: tuple[list[int], ...], count_padding: bool) -> str:
    """Windows that hang over the edge: sums of the padded input, divided by what torch counts in each window."""
    window, steps, pads = how
    ends, counts = [], []
    for size, k, s, p in zip(spatial, window, steps, pads):
        number = -(-(size + 2 * p - k) // s) + 1
        if (number - 1) * s >= size + p:  # the last window must begin inside the input or its left padding
            number -= 1
        ends.append(max(0, (number - 1) * s + k - size - p))
        begins = [i * s - p for i in range(number)]
        low, high = (-p, size + p) if count_padding else (0, size)
        counts.append([min(b + k, high) - max(b, low) for b in begins])
    b, rank = w.builder, len(spatial)
    padded = b.op("Pad", [x, b.ints([0, 0, *pads, 0, 0, *ends])])
    means = b.op("AveragePool", [padded], kernel_shape=window, strides=steps)
    grid = np.ones([1] * rank)
    for axis, count in enumerate(counts):
        grid = grid * np.asarray(count, np.float64).reshape([-1 if i == axis else 1 for i in range(rank)])
    return b.op("Mul", [means, w.builder.constant((math.prod(window) / grid)[None, None].astype(w.profile.floats))])


def _resize(mode: str, coordinates: str, rank: int, **extra: Any) -> FunctionEmitter:
    """By the sizes where they are fixed, by factors where the input's size is left open."""

    def emit(w: Writer, node: fx.Node, x: fx.Node, *arguments: Any, **named: Any) -> str:
        corners = coordinates == "half_pixel" and (named.get("align_corners") or _flag(arguments))
        factors = [new / old for new, old in zip(shape_of(node)[2:], shape_of(x)[2:])]
        scales = w.builder.floats([1.0, 1.0, *factors])
        chosen = "align_corners" if corners else coordinates
        given = [w.tensor(x), "", scales]
        return w.builder.op("Resize", given, mode=mode, coordinate_transformation_mode=chosen, **extra)

    return emit


def _flag(arguments: tuple[Any, ...]) -> bool:
    """align_corners stands second where the form has it."""
    return len(arguments) > 1 and arguments[1] is True


def _exact_nearest(rank: int) -> FunctionEmitter:
    return _resize("nearest", "half_pixel", rank, nearest_mode="round_prefer_ceil")


_SAMPLE_MODES, _SAMPLE_PADS = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")


def _grid_sample(
    w: Writer, node: fx.Node, x: fx.Node, grid: fx.Node, mode: int, padding: int, align_corners: bool
) -> str:
    """GridSample since opset 16, which renamed its modes in opset 20."""
    name = _SAMPLE_MODES[mode]
    if w.builder.opset >= 20:
        name = {"bilinear": "linear", "bicubic": "cubic"}.get(name, name)
    given: dict[str, Any] = {"mode": name, "padding_mode": _SAMPLE_PADS[padding], "align_corners": int(align_corners)}
    return w.builder.op("GridSample", [w.tensor(x), w.tensor(grid)], **given)


def _pixel_shuffle(w: Writer, node: fx.Node, x: fx.Node, factor: int) -> str:
    return w.builder.op("DepthToSpace", [w.tensor(x)], blocksize=factor, mode="CRD")


def _pixel_unshuffle(w: Writer, node: fx.Node, x: fx.Node, factor: int) -> str:
    """SpaceToDepth puts the channels last in each block; torch puts them first."""
    b, channels = w.builder, shape_of(x)[axis_of(x, 1)]
    made = b.op("SpaceToDepth", [w.tensor(x)], blocksize=factor)
    order = np.arange(channels * factor**2).reshape(factor**2, channels).T.reshape(-1)
    return b.op("Gather", [made, b.ints(order)], axis=1)


POOLING: dict[Any, FunctionEmitter] = {
    **{getattr(aten, f"adaptive_avg_pool{n}d").default: _adaptive_avg(n) for n in (1, 2, 3)},
    **{getattr(aten, f"_adaptive_avg_pool{n}d").default: _adaptive_avg(n) for n in (2, 3)},
    **{getattr(aten, f"adaptive_max_pool{n}d").default: _adaptive_max(n) for n in (1, 2, 3)},
    **{getattr(aten, f"max_pool{n}d").default: _max_pool(n) for n in (1, 2, 3)},
    **{getattr(aten, f"max_pool{n}d_with_indices").default: _max_pool(n, indices=True) for n in (2, 3)},
    aten.max_pool1d_with_indices.default: _max_pool(1, indices=True),
    **{getattr(aten, f"avg_pool{n}d").default: _avg_pool(n) for n in (1, 2, 3)},
    **{
        getattr(getattr(aten, f"upsample_nearest{n}d"), form): _resize("nearest", "asymmetric", n, nearest_mode="floor")
        for n in (1, 2, 3)
        for form in ("default", "vec")
    },
    **{
        getattr(getattr(aten, f"_upsample_nearest_exact{n}d"), form): _exact_nearest(n)
        for n in (1, 2, 3)
        for form in ("default", "vec")
    },
    **{
        getattr(getattr(aten, f"upsample_{kind}{n}d"), form): _resize(mode, "half_pixel", n, **extra)
        for kind, n, mode, extra in (
            ("linear", 1, "linear", {}),
            ("bilinear", 2, "linear", {}),
            ("trilinear", 3, "linear", {}),
            ("bicubic", 2, "cubic", {"cubic_coeff_a": -0.75}),
        )
        for form in ("default", "vec")
    },
    aten.grid_sampler.default: _grid_sample,
    aten.grid_sampler_2d.default: _grid_sample,
    aten.pixel_shuffle.default: _pixel_shuffle,
    aten.pixel_unshuffle.default: _pixel_unshuffle,
}
