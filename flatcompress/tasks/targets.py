"""Targets out of what people pass; where they are of another kind than the task's, the task that they belong to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatcompress.errors import UserError

_MOST_CLASSES = 1_000_000
_MOST_MAP_CLASSES = 1_000
_OUTSIDE = 1e-3  # of a side: what rounding puts a box beyond its image
_BOXES = "targets of task detection are boxes, class x0 y0 x1 y1 a row, [m, 5] for every image"


def class_numbers(targets: Any, where: str) -> Tensor:
    """int64 [N] of whole numbers from 0 on. UserError, naming the task, for targets that are no class numbers.

    >>> class_numbers([2, 0, 1], "train")
    tensor([2, 0, 1])
    """
    found = _tensor(targets, where)
    if found.ndim != 1:
        raise UserError(f"data[{where!r}]: {_of_another_shape(found)}")
    if found.is_complex() or found.is_floating_point():
        raise UserError(
            f"data[{where!r}]: the targets are {_type(found)}, first {found.flatten()[:1].tolist()}; classification "
            "needs whole numbers. Numbers to be predicted are for regression (task: regression); class numbers are "
            "passed as integers (y.long())."
        )
    labels = found.long()
    if len(labels) and int(labels.min()) < 0:
        position = int((labels < 0).nonzero()[0])
        raise UserError(
            f"data[{where!r}]: label {int(labels[position])} at position {position}: labels go from 0 on. Leave out "
            "the samples that have none."
        )
    if len(labels) and int(labels.max()) >= _MOST_CLASSES:
        raise UserError(f"data[{where!r}]: label {int(labels.max())}; at most {_MOST_CLASSES:,} classes are taken.")
    return labels


def numbers(targets: Any, where: str) -> Tensor:
    """float32 [N, K] of regression targets; [N] becomes [N, 1], and maps stay as they are [N, ...].

    UserError for what is not finite, and for text.

    >>> numbers([0.5, 2], "train")
    tensor([[0.5000],
            [2.0000]])
    """
    found = _tensor(targets, where)
    if found.ndim == 0:
        raise UserError(f"data[{where!r}]: the targets are one number ({found.item()}); one a sample is needed.")
    if found.is_complex():
        raise UserError(
            f"data[{where!r}]: the targets are complex numbers; give real and imaginary part as two columns."
        )
    given = found.float()
    _finite(given, where, "target")
    return given[:, None] if given.ndim == 1 else given


def labels(targets: Any, where: str) -> Tensor:
    """float32 [N, labels] of zeros and ones. UserError for anything else, naming the task it belongs to."""
    found = _tensor(targets, where)
    if found.ndim == 1 and not found.is_floating_point():
        raise UserError(
            f"data[{where!r}]: the targets are [N] class numbers: one class a sample is task: classification. "
            "Several labels a sample are zeros and ones, [N, labels]."
        )
    if found.ndim != 2:
        raise UserError(
            f"data[{where!r}]: multilabel targets are [N, labels] zeros and ones, found {tuple(found.shape)}."
        )
    strange = ~((found == 0) | (found == 1))
    if bool(strange.any()):
        row, column = strange.nonzero()[0].tolist()
        raise UserError(
            f"data[{where!r}]: label {column} of sample {row} is {found[row, column].item():g}; multilabel targets are "
            "zeros and ones. Numbers to be predicted are for task: regression."
        )
    return found.float()


def class_maps(dims: int, task: str, ignore: int | None) -> Any:
    """A function that reads int64 class numbers of ``dims`` dimensions a sample: masks (2), steps (1)."""
    wanted = {1: "[N, T], one class a step", 2: "[N, H, W], one class a pixel"}[dims]

    def read(targets: Any, where: str) -> Tensor:
        found = _tensor(targets, where)
        if found.ndim == dims + 2 and found.shape[1] == 1:
            found = found.squeeze(1)  # masks as images of one channel
        if found.ndim != dims + 1:
            raise UserError(f"data[{where!r}]: targets of task {task} are {wanted}, found {tuple(found.shape)}.")
        whole = not (found.is_floating_point() or found.is_complex()) or bool((found == found.round()).all())
        if found.is_complex() or not whole:
            raise UserError(f"data[{where!r}]: targets of task {task} are class numbers, found {_type(found)}.")
        numbers = found if found.dtype in (torch.uint8, torch.int16) else found.long()
        counted = numbers if ignore is None else numbers[numbers != ignore]
        if counted.numel() and int(counted.min()) < 0:
            bad = ((numbers < 0) & (numbers != (ignore if ignore is not None else 0))).flatten(1).any(1)
            raise UserError(
                f"data[{where!r}]: class {int(counted.min())} in sample {int(bad.nonzero()[0])}: classes go from 0 on. "
                "What counts for nothing is named as the task's ignore_index."
            )
        if counted.numel() and int(counted.max()) >= _MOST_MAP_CLASSES:
            raise UserError(
                f"data[{where!r}]: class {int(counted.max())}; at most {_MOST_MAP_CLASSES:,} are taken. A mask of "
                "0 and 255 has the classes 0 and 1: divide it, or name 255 as ignore_index where it stands for nothing."
            )
        return numbers

    return read


def box_lists(targets: Any, where: str) -> Tensor:
    """float32 [N, M, 6] of boxes: class (-1 for none), x0, y0, x1, y1 as shares of the sides, 1 where to be ignored.

    Given: a tensor of that shape (or [N, M, 5]), or a list with [m, 5] or [m, 6] for every image. UserError for
    boxes that lie outside of their image or have no area, naming the image and the box.
    """
    try:
        every = [torch.as_tensor(one, dtype=torch.float32) for one in targets]
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"data[{where!r}]: {_BOXES} ({str(error).splitlines()[0][:100]}).") from None
    found = torch.zeros(len(every), max([1, *(len(one) for one in every if one.ndim)]), 6)
    found[..., 0] = -1
    for i, one in enumerate(every):
        one = one.reshape(0, 5) if one.numel() == 0 else one
        if one.ndim != 2 or one.shape[1] not in (5, 6):
            raise UserError(f"data[{where!r}]: {_BOXES}; that of image {i} is {tuple(one.shape)}.")
        _check_boxes(one, f"data[{where!r}], image {i}")
        found[i, : len(one), : one.shape[1]] = one
    found[..., 1:5] = found[..., 1:5].clamp(0, 1)
    return found


def _check_boxes(rows: Tensor, where: str) -> None:
    """UserError for the first of [m, 5] that is no box."""
    for j, row in enumerate(rows[rows[:, 0] != -1].tolist()):
        label, x0, y0, x1, y1 = row[:5]
        if not all(map(math.isfinite, row)) or label < 0 or label != int(label) or label >= _MOST_MAP_CLASSES:
            raise UserError(f"{where}: box {j} is of class {label:g}; classes are whole numbers from 0 on.")
        if x1 <= x0 or y1 <= y0:
            raise UserError(f"{where}: box {j} has no area: {x0:g}, {y0:g} to {x1:g}, {y1:g}.")
        if min(x0, y0) < -_OUTSIDE or max(x1, y1) > 1 + _OUTSIDE:
            raise UserError(
                f"{where}: box {j} lies outside of its image: {x0:g}, {y0:g} to {x1:g}, {y1:g}. Coordinates are shares "
                "of the image's width and height, 0 to 1: divide pixels by them."
            )


def any_targets(targets: Any, where: str) -> Tensor:
    """A tensor [N, ...] as it is, doubles as float32. UserError for what is no tensor, or not finite."""
    found = _tensor(targets, where)
    if found.ndim == 0:
        raise UserError(f"data[{where!r}]: the targets are one number ({found.item()}); one a sample is needed.")
    if found.is_floating_point():
        found = found.float()
        _finite(found, where, "target")
    return found


def normal_or_not(targets: Any, where: str) -> Tensor:
    """int64 [N] for reconstruction: 0 normal, 1 anomalous, -1 where nobody said. UserError for other values."""
    found = _tensor(targets, where)
    known = found.ndim == 1 and bool(((found == 0) | (found == 1) | (found == -1)).all())
    if not known:
        raise UserError(
            f"data[{where!r}]: targets of task reconstruction say what is an anomaly, [N]: 0 normal, 1 anomalous (-1 "
            f"unknown), or are left out; found {_type(found)} {tuple(found.shape)}."
        )
    return found.long()


def _finite(found: Tensor, where: str, what: str) -> None:
    bad = ~found.isfinite().reshape(len(found), -1).all(1)
    if bool(bad.any()):
        raise UserError(f"data[{where!r}]: {what} {int(bad.nonzero()[0])} holds NaN or infinity.")


def _tensor(targets: Any, where: str) -> Tensor:
    flat = targets if isinstance(targets, Sequence) else ()
    if isinstance(targets, np.ndarray) and targets.dtype.kind in "OUS":
        flat = targets.reshape(-1)[:1].tolist()
    if len(flat) and isinstance(flat[0], str | bytes):
        raise UserError(
            f"data[{where!r}]: the labels are text, first {flat[0]!r}: number the classes from 0 on, and give their "
            "names as data['classes']."
        )
    try:
        return torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:150]
        raise UserError(
            f"data[{where!r}]: the targets are no numbers or class numbers, one a sample ({reason})."
        ) from None


def _of_another_shape(found: Tensor) -> str:
    shape = tuple(found.shape)
    if found.ndim == 0:
        return f"the targets are one number ({found.item()}); one a sample is needed."
    if found.ndim == 2 and shape[1] == 1:
        return f"the targets are {shape}: one number a sample is needed, [N]: y.squeeze(1)."
    if found.ndim == 2:
        return _of_columns(found)
    return (
        f"the targets are {shape}, {found.ndim - 1} dimensions a sample: masks are for segmentation "
        "(task: segmentation). Classification needs one class number a sample, [N]."
    )


def _of_columns(found: Tensor) -> str:
    shape = tuple(found.shape)
    binary = bool(((found == 0) | (found == 1)).all())
    if binary and bool((found.sum(1) == 1).all()):
        return (
            f"the targets are one-hot {shape}; classification needs class numbers, [N]: y.argmax(1). Several labels a "
            "sample are for task: multilabel."
        )
    if binary:
        return f"the targets are {shape} zeros and ones, several labels a sample (task: multilabel)."
    if found.is_floating_point():
        return f"the targets are {_type(found)} {shape}: numbers to be predicted are for regression (task: regression)."
    return f"the targets are {shape}: a class for every step of a sample (task: sequence)."


def _type(found: Tensor) -> str:
    return str(found.dtype).removeprefix("torch.")
