"""One class a pixel: logits [B, classes, H, W], masks of class numbers [B, H, W]."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flatcompress.errors import UserError, unknown
from flatcompress.tasks import metrics
from flatcompress.tasks.classification import given, weighted
from flatcompress.tasks.losses import CrossEntropy, check_focal, check_weights
from flatcompress.tasks.outputs import class_map
from flatcompress.tasks.targets import class_maps
from flatcompress.tasks.task import Task


def segmentation(
    ignore_index: Any = None, class_weights: Any = None, focal: float = 0.0, select: str = "mean_iou"
) -> Task:
    """``ignore_index``: the number in masks that counts for nothing. ``select``: mean_iou or accuracy (of pixels)."""
    ignore = check_index("segmentation", ignore_index)
    loss = CrossEntropy(focal=check_focal("segmentation", focal), ignore=ignore)
    weights = check_weights("segmentation", class_weights)
    table = {
        "mean_iou": metrics.confusion(None, 1, metrics.mean_iou, ignore),
        "accuracy": metrics.accuracy(1, ignore),
    }
    if select not in table:
        raise unknown("metric of task segmentation", select, table)
    return Task(
        loss,
        {name: table[name] for name in dict.fromkeys([select, *table])},
        "segmentation",
        class_maps(2, "segmentation", ignore),
        names=lambda masks: counted_classes(masks, ignore),
        output=class_map,
        agreement="argmax_channels",
        target=lambda x, y: y.long(),
        smoothed=loss.smoothed,
        summed=loss.summed,
        fitted=lambda task, masks, classes: weighted(task, loss, weights, masks, classes),
        fits=same_size,
        of_classes=True,
        options=given(ignore_index=ignore_index, class_weights=class_weights, focal=focal,
                      **({} if select == "mean_iou" else {"select": select})),
    )  # fmt: skip


def same_size(inputs: tuple[int, ...], targets: tuple[int, ...]) -> str | None:
    """A mask has a class for every pixel."""
    if inputs[1:] == targets:
        return None
    return f"masks are {targets} and images {inputs}: a mask has one class for every pixel of its image."


def counted_classes(targets: Tensor, ignore: int | None) -> tuple[str, ...]:
    """The classes that occur, numbered up to the largest."""
    found = targets.unique().tolist()
    return tuple(str(c) for c in range(1 + max([c for c in found if c != ignore], default=0)))


def check_index(task: str, value: Any) -> int | None:
    """UserError for what is no whole number."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and -(2**15) <= value < 2**15):
        return value
    raise UserError(f"task {task}: ignore_index is a whole number such as 255 or -100, found {value!r}.")
