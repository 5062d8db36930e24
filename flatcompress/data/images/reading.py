"""All image files of a data set: read into memory or as they are asked for, on one scale of intensity."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatcompress.data.images.decoding import (
    DAMAGED,
    MOST_PIXELS,
    Range,
    decode,
    decodes_jpeg,
    is_deep,
    is_jpeg,
    opened,
)
from flatcompress.data.images.pixels import MemoryPixels, Pixels, Shape
from flatcompress.errors import UserError

MOST_BYTES = 2 << 30  # of decoded images kept in memory; a larger set is decoded as it is read
_MANY = 1000  # JPEG files, from which on a faster decoder is worth a sentence
_SEVERAL = ("GIF", "TIFF", "WEBP", "PNG")  # formats that may hold more than one picture


class FilePixels:
    """Images decoded from their files as they are asked for."""

    on_disk = True

    def __init__(self, paths: Sequence[Path], shape: Shape, intensity: Range | None = None) -> None:
        self.paths, self._shape, self.intensity = list(paths), shape, intensity

    @property
    def shape(self) -> Shape:
        return self._shape

    def __len__(self) -> int:
        return len(self.paths)

    def gather(self, rows: Tensor) -> Tensor:
        return torch.stack([decode(self.paths[row], self._shape, self.intensity) for row in rows.tolist()])


class Reader:
    """Reads a data set's files at one ``shape``.

    ``intensity``: [low, high] of 16-bit, 32-bit and float images, which become 0 and 1; found by `look` where it is
    not given. None while every image has eight bits. ``notes``: sentences for the user about what was found.
    """

    def __init__(self, shape: Shape, skip_bad: bool = False, intensity: Any = None) -> None:
        self.shape, self.skip_bad = shape, skip_bad
        self.given = _checked(intensity)
        self.intensity: Range | None = None
        self.notes: list[str] = []

    def look(self, paths: Iterable[Path]) -> None:
        """See by their headers what ``paths`` hold, and set one range of intensity for them all.

        Call it once with every file of the set, before `read`. Deep images are read whole for their least and largest
        value; the range begins at 0 unless a value is below it.
        """
        deep: list[Path] = []
        total, cut, several, jpegs = 0, 0, 0, 0
        for path in paths:
            total += 1
            jpegs += is_jpeg(path)
            kind = _kind(path)
            if kind == "deep":
                deep.append(path)
            cut += kind == "cut"
            several += kind == "several"
        if cut:
            self.notes.append(f"{cut} of {total} images have 16 bits a colour, of which Pillow reads the upper 8")
        if several:
            self.notes.append(f"{several} of {total} image files hold several pictures; the first of each is read")
        if jpegs >= _MANY and not decodes_jpeg():
            self.notes.append(
                f"{jpegs} JPEG files are decoded by Pillow; the same pixels come about 1.4 times as fast with "
                "pip install 'flatcompress[jpeg]'"
            )
        if deep:
            self.intensity = self.given or _extent(deep)
            self._say_range(len(deep), total)

    def _say_range(self, deep: int, total: int) -> None:
        low, high = self.intensity or (0.0, 1.0)
        how = (
            "as intensity says"
            if self.given
            else "the least and largest value found; set it with intensity: [low, high]"
        )
        mixed = "" if deep == total else f" The other {total - deep} have eight bits and go from 0 to 255."
        self.notes.append(
            f"{deep} of {total} images are 16-bit, 32-bit or float: one range for all of them, {low:g} to {high:g} "
            f"becomes 0 to 1 ({how}).{mixed}"
        )

    def read(self, paths: Sequence[Path]) -> tuple[Pixels, list[int], list[str]]:
        """Pixels of ``paths``, the positions that could be read, and why the others could not.

        A set that fits in memory is decoded here, so a broken file is found before anything runs; a larger one has only
        its headers read. UserError at the first bad file unless ``skip_bad``.
        """
        kind = torch.uint8 if self.intensity is None else torch.float32
        in_memory = len(paths) * torch.Size(self.shape).numel() * kind.itemsize <= MOST_BYTES
        good: list[int] = []
        reasons: list[str] = []
        images = torch.empty((len(paths) if in_memory else 0, *self.shape), dtype=kind)
        for position, path in enumerate(paths):
            try:
                if in_memory:
                    images[len(good)] = decode(path, self.shape, self.intensity)
                else:
                    _check_header(path)
            except UserError as error:
                if not self.skip_bad:
                    raise
                reasons.append(str(error))
            else:
                good.append(position)
        if in_memory:
            return MemoryPixels(images[: len(good)]), good, reasons
        return FilePixels([paths[i] for i in good], self.shape, self.intensity), good, reasons


def _checked(intensity: Any) -> Range | None:
    if intensity is None:
        return None
    numbers = isinstance(intensity, list | tuple) and all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in intensity
    )
    if not numbers or len(intensity) != 2 or not -1e30 < intensity[0] < intensity[1] < 1e30:
        raise UserError(f"data option 'intensity' must be [low, high], two numbers in that order, found {intensity!r}")
    return float(intensity[0]), float(intensity[1])


def _kind(path: Path) -> str:
    """deep | cut (16 bits a colour, which Pillow reads as 8) | several | plain; a bad file is plain here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with opened(path) as image:
                if is_deep(image):
                    return "deep"
                if any(";16" in str(tile[3]) for tile in image.tile):
                    return "cut"
                return "several" if image.format in _SEVERAL and getattr(image, "n_frames", 1) > 1 else "plain"
        except DAMAGED:
            return "plain"


def _extent(paths: Sequence[Path]) -> Range:
    low, high = 0.0, -np.inf
    for path in paths:
        try:
            with opened(path) as image:
                if image.width * image.height > MOST_PIXELS:
                    continue  # said when it is read
                values = np.asarray(image)
        except DAMAGED:
            continue  # said when it is read
        if values.size and np.isfinite(values).all():
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    return (low, high) if high > low else (low, low + 1.0)


def _check_header(path: Path) -> None:
    try:
        with opened(path) as image:
            size = image.width * image.height
    except DAMAGED:
        size = 0
    if not 0 < size <= MOST_PIXELS:
        decode(path, (3, 8, 8))  # says what is wrong
        raise UserError(f"{path}: not an image that can be used.")


def skips(on_bad_sample: str) -> bool:
    """Whether images that cannot be read are left out. UserError: neither error nor skip."""
    if on_bad_sample not in ("error", "skip"):
        raise UserError(f"data option 'on_bad_sample' must be error or skip, found {on_bad_sample!r}")
    return on_bad_sample == "skip"
