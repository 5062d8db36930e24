"""One class a pixel: logits [B, classes, H, W], masks of class numbers [B, H, W]."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
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
        moved=lambda masks, theta: moved(masks, theta, ignore),
        drawn=lambda picture, output, y, names: drawn(picture, output.argmax(0), y, ignore),
        options=given(ignore_index=ignore_index, class_weights=class_weights, focal=focal,
                      **({} if select == "mean_iou" else {"select": select})),
    )  # fmt: skip


def same_size(inputs: tuple[int, ...], targets: tuple[int, ...]) -> str | None:
    """A mask has a class for every pixel."""
    if inputs[1:] == targets:
        return None
    return f"masks are {targets} and images {inputs}: a mask has one class for every pixel of its image."


def moved(masks: Tensor, theta: Tensor, ignore: int | None) -> Tensor:
    """Masks [B, H, W] of images sampled at ``theta``, by the nearest pixel; outside of the image they are ignored."""
    grid = F.affine_grid(theta, [len(masks), 1, *masks.shape[1:]], align_corners=False)
    found = F.grid_sample(masks[:, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)
    found = found[:, 0].to(masks.dtype)
    outside = (grid.abs() > 1).any(-1)
    return found if ignore is None else torch.where(outside, torch.tensor(ignore, dtype=masks.dtype), found)


def drawn(picture: Image.Image, found: Tensor, y: Tensor, ignore: int | None) -> Image.Image:
    """The picture, its true mask and the one found, side by side; what is ignored is grey."""
    wide = Image.new("RGB", (3 * picture.width + 4, picture.height), "white")
    wide.paste(picture, (0, 0))
    for place, mask in enumerate((y, found), 1):
        flat = mask.flatten().tolist()
        rgb = {label: ImageColor.getrgb(f"hsl({label * 137 % 360}, 75%, 50%)") for label in set(flat)}
        rgb |= {0: (32, 32, 32), ignore: (136, 136, 136)}  # type: ignore[dict-item]
        shown = Image.new("RGB", (mask.shape[1], mask.shape[0]))
        shown.putdata([rgb[label] for label in flat])
        wide.paste(shown.resize(picture.size, Image.Resampling.NEAREST), (place * (picture.width + 2), 0))
    return wide


def counted_classes(targets: Tensor, ignore: int | None) -> tuple[str, ...]:
    """The classes that occur, numbered up to the largest."""
    found = targets.unique().tolist()
    return tuple(str(c) for c in range(1 + max([c for c in found if c != ignore], default=0)))


def check_index(task: str, value: Any) -> int | None:
    """UserError for what is no whole number."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and -(2**15) <= value < 2**15):
        return value
    raise UserError(f"task {task}: ignore_index is a whole number such as 255 or -100, found {value!r}.")
