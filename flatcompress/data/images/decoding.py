"""Image files as uint8 tensors of one shape, with every way in which a file can be bad said by name."""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from flatcompress.data.images.pixels import MemoryPixels, Pixels, Shape
from flatcompress.errors import UserError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
MOST_PIXELS = 100_000_000  # a 10,000 x 10,000 image; more is a mistake or a decompression bomb
# Pillow's readers let through whatever their parsing of a damaged file met.
DAMAGED = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError),
    *(RuntimeError, AssertionError, struct.error, zlib.error, Image.DecompressionBombError),
)
MOST_BYTES = 2 << 30  # of decoded images kept in memory; a larger set is decoded as it is read


def output_shape(size: int | Sequence[int], channels: int) -> Shape:
    """(C, H, W) of ``size`` (a number or [height, width]) and ``channels`` (1 or 3). UserError for anything else."""
    sides = [size, size] if isinstance(size, int) else list(size) if isinstance(size, list | tuple) else []
    good = len(sides) == 2 and all(isinstance(s, int) and not isinstance(s, bool) and 4 <= s <= 4096 for s in sides)
    if not good:
        raise UserError(f"data option 'size' must be a number from 4 to 4096 or [height, width], found {size!r}")
    if channels not in (1, 3):
        raise UserError(f"data option 'channels' must be 1 or 3, found {channels!r}")
    return channels, sides[0], sides[1]


def decode(path: Path, shape: Shape) -> Tensor:
    """uint8 [C, H, W] of an image file: turned as its EXIF says, transparency on white, 16 bits to 8, resized.

    UserError names the file: missing, unreadable, empty, no image, truncated, too large.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: not a plain file.")
        if found.st_size == 0:
            raise UserError(f"{path}: empty file (0 bytes). Remove it, or use on_bad_sample: skip.")
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UserError(f"{path}: {image.width} x {image.height} pixels; at most {MOST_PIXELS:,} are read.")
            plain = _eight_bits(ImageOps.exif_transpose(image), shape[0])
            resized = plain.resize((shape[2], shape[1]), Image.Resampling.BILINEAR)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image, or cut off. Remove it, or use on_bad_sample: skip.") from None
    except DAMAGED as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}). Remove it, or use on_bad_sample: skip.") from None
    array = np.asarray(resized, dtype=np.uint8).reshape(shape[1], shape[2], shape[0])
    return torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous()


def _eight_bits(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(float(values.max(initial=0.0)), 1e-12)
        image = Image.fromarray((values.clip(0, top) / top * 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("L" if channels == 1 else "RGB")


class FilePixels:
    """Images decoded from their files as they are asked for."""

    def __init__(self, paths: Sequence[Path], shape: Shape) -> None:
        self.paths, self._shape = list(paths), shape

    @property
    def shape(self) -> Shape:
        return self._shape

    def __len__(self) -> int:
        return len(self.paths)

    def gather(self, rows: Tensor) -> Tensor:
        return torch.stack([decode(self.paths[row], self._shape) for row in rows.tolist()])


def read_all(paths: Sequence[Path], shape: Shape, skip_bad: bool) -> tuple[Pixels, list[int], list[str]]:
    """Pixels of ``paths``, the positions that could be read, and why the others could not.

    A set that fits in memory is decoded here, so a broken file is found before anything runs; a larger one has only its
    headers read. UserError at the first bad file unless ``skip_bad``.
    """
    channels, height, width = shape
    in_memory = len(paths) * channels * height * width <= MOST_BYTES
    good: list[int] = []
    reasons: list[str] = []
    images = torch.empty((len(paths) if in_memory else 0, *shape), dtype=torch.uint8)
    for position, path in enumerate(paths):
        try:
            if in_memory:
                images[len(good)] = decode(path, shape)
            else:
                _check_header(path)
        except UserError as error:
            if not skip_bad:
                raise
            reasons.append(str(error))
        else:
            good.append(position)
    pixels: Pixels = MemoryPixels(images[: len(good)]) if in_memory else FilePixels([paths[i] for i in good], shape)
    return pixels, good, reasons


def _check_header(path: Path) -> None:
    try:
        with Image.open(path) as image:
            size = image.width * image.height
    except DAMAGED:
        size = 0
    if not 0 < size <= MOST_PIXELS:
        decode(path, (3, 8, 8))  # says what is wrong
        raise UserError(f"{path}: not an image that can be used.")
