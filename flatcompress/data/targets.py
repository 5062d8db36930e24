"""Class numbers out of what people pass as targets; for every other kind of target, the task that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatcompress.errors import UserError

_MOST_CLASSES = 1_000_000


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
            "needs whole numbers. Regression is not supported yet (task: regression); class numbers are passed "
            "as integers (y.long())."
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
        raise UserError(f"data[{where!r}]: the targets are no class numbers, one a sample ({reason}).") from None


def _of_another_shape(found: Tensor) -> str:
    shape = tuple(found.shape)
    if found.ndim == 0:
        return f"the targets are one number ({found.item()}); one a sample is needed."
    if found.ndim == 2 and shape[1] == 1:
        return f"the targets are {shape}: one number a sample is needed, [N]: y.squeeze(1)."
    if found.ndim == 2:
        return _of_columns(found)
    return (
        f"the targets are {shape}, {found.ndim - 1} dimensions a sample: masks are for segmentation, which is not "
        "supported yet (task: segmentation). Classification needs one class number a sample, [N]."
    )


def _of_columns(found: Tensor) -> str:
    shape = tuple(found.shape)
    binary = bool(((found == 0) | (found == 1)).all())
    if binary and bool((found.sum(1) == 1).all()):
        return f"the targets are one-hot {shape}; classification needs class numbers, [N]: y.argmax(1)."
    if binary:
        return (
            f"the targets are {shape} zeros and ones, several labels a sample: multi-label classification is not "
            "supported yet (task: multilabel)."
        )
    if found.is_floating_point():
        return f"the targets are {_type(found)} {shape}: regression is not supported yet (task: regression)."
    return f"the targets are {shape}: a sequence of classes a sample is not supported yet (task: sequence)."


def _type(found: Tensor) -> str:
    return str(found.dtype).removeprefix("torch.")
