"""Images with mask images: a class for every pixel."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flatcompress.data.bundle import Part
from flatcompress.data.images.decoding import DAMAGED, opened, output_shape
from flatcompress.data.images.files import Finder, data_root
from flatcompress.data.images.layout import PART_OF, one_each, one_name
from flatcompress.data.images.pixels import Shape
from flatcompress.data.images.reading import Reader
from flatcompress.data.raw_data import RawData
from flatcompress.data.split import split_identities
from flatcompress.errors import UserError
from flatcompress.tasks import Task, build, built_in

NAME = "image-masks"
_ENDINGS = ("_mask", "_masks", "_gt", "_seg", "_label", "_labels", "-mask")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
Pair = tuple[Path, Path]


def image_masks(
    seed: int,
    *,
    path: Any = None,
    images: str = "images",
    masks: str = "masks",
    classes: Any = None,
    values: Any = None,
    size: Any = 64,
    channels: int = 3,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    intensity: Any = None,
    task: Any = None,
) -> RawData:
    """PATH/images/NAME and PATH/masks/NAME, split by the seed; or both below PATH/train, PATH/val, PATH/test.

    A mask has its image's name (with another suffix, and perhaps ``_mask`` behind it) and its size, and holds class
    numbers: one channel or a palette. values: the grey values, or [r, g, b], that stand for class 0, 1 ...
    classes: their names. The task's ``ignore_index`` is left as it is. Masks are brought to ``size`` by the nearest
    pixel. UserError names the mask, and the image that has none.
    """
    root, learned = data_root(path, NAME), build("segmentation" if task is None else task)
    if learned.name != "segmentation" and built_in(learned.name):
        raise UserError(f"data set {NAME!r} has targets for task 'segmentation', not {learned.name!r}.")
    finder, shape = Finder(root), output_shape(size, channels)
    found = _pairs(root, finder, images, masks)
    every = [pair for pairs in found.values() for pair in pairs]
    reader = Reader(shape, False, intensity)
    reader.look([image for image, _ in every])
    pixels, _, _ = reader.read([image for image, _ in every])
    coded = _codes(values)
    read = torch.stack([_mask(image, mask, shape, coded, learned) for image, mask in every])
    targets = learned.targets(read, root.name)
    names = _names(classes, learned, targets, root)
    rows = _rows(found, len(every), {"test": test_fraction, "val": val_fraction}, seed)
    _check_learnable(rows, targets, names, learned, root)
    zeros = torch.zeros(len(every), dtype=torch.int64)

    def part(chosen: Tensor) -> Part:
        return Part(pixels, chosen, zeros[chosen], zeros[chosen], chosen, targets[chosen])

    return RawData(
        names,
        part(rows["train"]),
        part(rows["val"]),
        part(rows["test"]),
        notes=(*finder.left_out(), *reader.notes),
        intensity=reader.intensity,
        task=learned.name,
    )


def _pairs(root: Path, finder: Finder, images: str, masks: str) -> dict[str, list[Pair]]:
    """Image and mask of each part; "" where nobody has split them."""
    parts = one_each({p: PART_OF[p.name.lower()] for p in finder.subfolders(root) if p.name.lower() in PART_OF}, root)
    if "train" in parts and len(parts) > 1:
        return {part: _matched(folder / images, folder / masks, finder) for part, folder in parts.items()}
    return {"": _matched(root / images, root / masks, finder)}


def _matched(images: Path, masks: Path, finder: Finder) -> list[Pair]:
    for folder, key in ((images, "images"), (masks, "masks")):
        if not folder.is_dir():
            raise UserError(f"data set {NAME!r}: there is no folder {folder}; name it with {key!r}.")
    by_name: dict[str, Path] = {}
    for mask in finder.images(masks):
        name = _key(mask, masks, _ENDINGS)
        if name in by_name:
            raise UserError(f"{mask}: {by_name[name].name} is a mask of the same image.")
        by_name[name] = mask
    pairs = []
    for image in finder.images(images):
        found = by_name.pop(_key(image, images, ()), None)
        if found is None:
            raise UserError(f"{image}: it has no mask in {masks}.")
        pairs.append((image, found))
    if by_name:
        raise UserError(f"{next(iter(by_name.values()))}: it has no image in {images} ({len(by_name)} such masks).")
    if not pairs:
        raise UserError(f"{images}: no image in it.")
    return pairs


def _key(path: Path, folder: Path, endings: Sequence[str]) -> str:
    name = one_name(path.relative_to(folder).with_suffix("").as_posix())
    return next((name.removesuffix(end) for end in endings if name.endswith(end)), name)


def _codes(values: Any) -> list[tuple[int, ...]] | None:
    """The grey value or colour of each class."""
    if values is None:
        return None
    given = [v if isinstance(v, list | tuple) else [v] for v in values] if isinstance(values, list | tuple) else []
    good = all(len(v) in (1, 3) and all(type(x) is int and 0 <= x <= 65535 for x in v) for v in given)
    if len(given) < 2 or not good or len({len(v) for v in given}) > 1 or len(set(map(tuple, given))) < len(given):
        raise UserError(
            f"data option 'values' lists the grey value, or [r, g, b], of each class, two or more, found {values!r}."
        )
    return [tuple(v) for v in given]


def _mask(image: Path, path: Path, shape: Shape, coded: list[tuple[int, ...]] | None, task: Task) -> Tensor:
    """int64 [H, W] of class numbers. UserError for a mask of another size, or with values that are no class."""
    try:
        with opened(image) as header:
            turned = header.getexif().get(274) in _TURNED
            wanted = header.size[::-1] if turned else header.size
        with opened(path) as found:
            if found.size != wanted:
                raise UserError(
                    f"{path}: the mask is {found.size[0]} x {found.size[1]}, its image {wanted[0]} x {wanted[1]}."
                )
            coloured = coded is not None and len(coded[0]) == 3
            pixels = np.asarray(found.convert("RGB") if coloured else found)
    except DAMAGED as error:
        raise UserError(f"{path}: cannot be read as a mask ({error}).") from None
    numbers = _classes(pixels, path, coded, task.options.get("ignore_index"))
    small = Image.fromarray(numbers.astype(np.int32)).resize((shape[2], shape[1]), Image.Resampling.NEAREST)
    return torch.from_numpy(np.asarray(small).astype(np.int64))


def _classes(
    pixels: NDArray[Any], path: Path, coded: list[tuple[int, ...]] | None, ignore: int | None
) -> NDArray[np.int64]:
    if coded is not None and len(coded[0]) == 3:
        flat = (pixels.astype(np.int64) * (65536, 256, 1)).sum(-1)
        return _looked_up(flat, [r * 65536 + g * 256 + b for r, g, b in coded], path, None, coloured=True)
    if pixels.ndim == 3:
        if not (pixels[..., :3] == pixels[..., :1]).all():
            raise UserError(f"{path}: a mask in colours; say what they stand for with values: [[r, g, b], ...].")
        pixels = pixels[..., 0]
    whole = pixels.astype(np.int64)
    if not np.array_equal(whole, pixels):
        raise UserError(f"{path}: a mask holds whole numbers.")
    if coded is not None:
        return _looked_up(whole, [code for (code,) in coded], path, ignore)
    found = np.unique(whole)
    if len(found) == 2 and found[0] == 0 and found[1] == 255 and ignore != 255:
        raise UserError(f"{path}: a mask of 0 and 255: say values: [0, 255] for two classes, or task.ignore_index 255.")
    return whole


def _looked_up(
    pixels: NDArray[np.int64], codes: list[int], path: Path, ignore: int | None, coloured: bool = False
) -> NDArray[np.int64]:
    out = np.full(pixels.shape, -1, np.int64)
    for number, code in enumerate(codes):
        out[pixels == code] = number
    if ignore is not None:
        out[(pixels == ignore) & (out < 0)] = ignore
    strange = (out < 0) & ~((pixels == ignore) if ignore is not None else np.zeros_like(out, bool))
    if strange.any():
        found = int(pixels[strange][0])
        shown = str([found >> 16, found >> 8 & 255, found & 255]) if coloured else str(found)
        raise UserError(f"{path}: it holds {shown}, which is none of 'values'.")
    return out


def _names(classes: Any, task: Task, targets: Tensor, root: Path) -> tuple[str, ...]:
    found = task.names(targets)
    if classes is None:
        return found
    if not isinstance(classes, list | tuple) or len(set(map(str, classes))) < len(classes):
        raise UserError(f"data option 'classes' is a list of different names, found {classes!r}.")
    if len(classes) < len(found):
        raise UserError(f"{root}: {len(classes)} classes are named, but a mask holds class {len(found) - 1}.")
    return tuple(str(c) for c in classes)


def _rows(found: dict[str, list[Pair]], count: int, fractions: dict[str, float], seed: int) -> dict[str, Tensor]:
    zeros = torch.zeros(count, dtype=torch.int64)
    if "" in found:
        if count < 3:
            raise UserError(f"data set {NAME!r}: {count} images; three are needed to be split.")
        return split_identities(zeros, fractions, seed)
    starts, at = {}, 0
    for part, pairs in found.items():
        starts[part] = torch.arange(at, at + len(pairs))
        at += len(pairs)
    if len(starts) == 3:
        return starts
    only = starts.get("test", starts.get("val", zeros))
    chosen = split_identities(zeros[starts["train"]], {"val": fractions["val"]}, seed)
    return {"train": starts["train"][chosen["train"]], "val": starts["train"][chosen["val"]], "test": only}


def _check_learnable(rows: dict[str, Tensor], targets: Tensor, names: Sequence[str], task: Task, root: Path) -> None:
    ignore = task.options.get("ignore_index")
    seen = {part: set(targets[chosen].unique().tolist()) - {ignore} for part, chosen in rows.items()}
    for part, found in seen.items():
        unseen = sorted(found - seen["train"])
        if unseen:
            named = ", ".join(names[c] for c in unseen[:5])
            raise UserError(f"{root}: masks of the {part} part hold {named}, which no mask of the train part does.")
    if len(seen["train"]) < 2:
        warnings.warn(f"{root}: every pixel of the training masks is of one class", stacklevel=4)
