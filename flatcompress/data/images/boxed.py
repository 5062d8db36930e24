"""Images with boxes, whatever file the boxes came from: read, split, and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatcompress.data.bundle import Part
from flatcompress.data.images.decoding import DAMAGED, opened, output_shape
from flatcompress.data.images.files import inside
from flatcompress.data.images.reading import Reader, skips
from flatcompress.data.raw_data import RawData, held_out_name
from flatcompress.data.targeted import split
from flatcompress.errors import UserError
from flatcompress.tasks import Task, build, built_in

_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_SLACK = 1.0  # pixels that a box may stick out by: annotation tools round
Row = tuple[int, float, float, float, float, int]  # class, x0, y0, x1, y1 as shares of the sides, ignored


@dataclass(frozen=True)
class Boxed:
    """An image file with its boxes, its part of the split ("" where nobody said), and its domain."""

    path: Path
    rows: list[Row]
    part: str = ""
    domain: str = ""


def learned(task: Any, data_set: str) -> Task:
    """The task: detection, or one of the user's own."""
    found = build("detection" if task is None else task)
    if found.name != "detection" and built_in(found.name):
        raise UserError(f"data set {data_set!r} has targets for task 'detection', not {found.name!r}.")
    return found


def size_of(path: Path, root: Path) -> tuple[int, int]:
    """Width and height as the image is shown. UserError for a file that is not there, lies outside, or is no image."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such image.")
    inside(path, root)
    try:
        with opened(path) as image:
            width, height = image.size
            return (height, width) if image.getexif().get(274) in _TURNED else (width, height)
    except DAMAGED as error:
        raise UserError(f"{path}: not an image ({str(error)[:100]}).") from None


def shares(label: int, box: Sequence[float], size: tuple[int, int], ignored: bool, where: str) -> Row:
    """A row from x0, y0, x1, y1 in pixels. UserError for a box without area, or outside of its image."""
    width, height = size
    x0, y0, x1, y1 = box
    shown = f"from {x0:g}, {y0:g} to {x1:g}, {y1:g}"
    if not (x1 > x0 and y1 > y0):
        raise UserError(f"{where}: the box {shown} has no area.")
    if x0 < -_SLACK or y0 < -_SLACK or x1 > width + _SLACK or y1 > height + _SLACK:
        raise UserError(f"{where}: the box {shown} lies outside of its image, {width} x {height}.")
    x0, x1 = max(0.0, x0 / width), min(1.0, x1 / width)
    y0, y1 = max(0.0, y0 / height), min(1.0, y1 / height)
    if not (x1 > x0 and y1 > y0):
        raise UserError(f"{where}: the box {shown} lies on the border of its image, {width} x {height}.")
    return label, x0, y0, x1, y1, int(ignored)


def raw_data(
    seed: int,
    items: Sequence[Boxed],
    classes: tuple[str, ...],
    *,
    root: Path,
    size: Any,
    channels: int,
    fractions: dict[str, float],
    held_out: Any,
    on_bad_sample: str,
    intensity: Any,
    task: Task,
    notes: Sequence[str],
) -> RawData:
    """The parts of a set of images with boxes: as their owner split them, or drawn by the seed."""
    if not any(item.rows for item in items):
        raise UserError(f"{root}: no box in {len(items)} images.")
    reader = Reader(output_shape(size, channels), skips(on_bad_sample), intensity)
    paths = [item.path for item in items]
    reader.look(paths)
    pixels, good, reasons = reader.read(paths)
    kept = [items[i] for i in good]
    known = tuple(sorted({item.domain for item in kept} - {""}))
    unseen = held_out_name(held_out, known)
    numbers = torch.tensor([known.index(item.domain) if item.domain else 0 for item in kept])
    outside = torch.tensor([unseen is not None and item.domain == unseen for item in kept])
    told = [item.part for item in kept] if any(item.part for item in kept) else None
    targets = task.targets([list(map(list, item.rows)) for item in kept], root.name)
    zeros = torch.zeros(len(kept), dtype=torch.int64)
    chosen = split(zeros, told, outside, fractions, seed, str(root))
    _check_learnable({**chosen, "held-out": outside.nonzero().flatten()}, targets, classes, root)

    def part(rows: Tensor) -> Part:
        return Part(pixels, rows, zeros[rows], numbers[rows], rows, targets[rows])

    empty = sum(not item.rows for item in kept)
    said = [f"{root}: {empty} of {len(kept)} images have no box: they teach what is none"] if empty else []
    return RawData(
        classes,
        part(chosen["train"]),
        part(chosen["val"]),
        part(chosen["test"]),
        None if unseen is None else part(outside.nonzero().flatten()),
        known,
        unseen,
        skipped=tuple(reasons),
        notes=(*notes, *reader.notes, *said),
        intensity=reader.intensity,
        task=task.name,
    )


def _check_learnable(rows: dict[str, Tensor], targets: Tensor, classes: Sequence[str], root: Path) -> None:
    seen = {part: set(targets[chosen][..., 0].unique().long().tolist()) - {-1} for part, chosen in rows.items()}
    if not seen["train"]:
        raise UserError(f"{root}: no box in the {len(rows['train'])} images of the train part.")
    for part, found in seen.items():
        unseen = sorted(found - seen["train"])
        if unseen:
            named = ", ".join(classes[c] for c in unseen[:5])
            raise UserError(f"{root}: the {part} part has boxes of {named}, and the train part has none to learn from.")
