"""One image file as a tensor of a given shape, with every way in which a file can be bad said by name."""

from __future__ import annotations

import io
import stat
import struct
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from flatcompress.data.images.pixels import Shape
from flatcompress.errors import UserError

# Not images in themselves, or handed by Pillow to another program or to a reader that is not there.
_NO_IMAGES = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})
MOST_PIXELS = 100_000_000  # a 10,000 x 10,000 image; more is a mistake or a decompression bomb
# Pillow's readers let through whatever their parsing of a damaged file met.
DAMAGED = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError),
    *(RuntimeError, AssertionError, struct.error, zlib.error, Image.DecompressionBombError),
)
Range = tuple[float, float]


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of the formats that this Pillow reads, in small letters."""
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(s for s, name in known if name in Image.OPEN and name not in _NO_IMAGES) | {".mpo"}


def readable(path: Path) -> bool:
    """Does the file's suffix, in any case, say that Pillow reads it?"""
    return path.suffix.lower() in suffixes()


def output_shape(size: int | Sequence[int], channels: int) -> Shape:
    """(C, H, W) of ``size`` (a number or [height, width]) and ``channels`` (1 or 3). UserError for anything else."""
    sides = [size, size] if isinstance(size, int) else list(size) if isinstance(size, list | tuple) else []
    good = len(sides) == 2 and all(isinstance(s, int) and not isinstance(s, bool) and 4 <= s <= 4096 for s in sides)
    if not good:
        raise UserError(f"data option 'size' must be a number from 4 to 4096 or [height, width], found {size!r}")
    if channels not in (1, 3):
        raise UserError(f"data option 'channels' must be 1 or 3, found {channels!r}")
    return channels, sides[0], sides[1]


def opened(path: Path) -> ImageFile.ImageFile:
    """Pillow's image of a plain file, only its header read. OSError for anything else: a pipe would be waited for."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a plain file")
    return Image.open(path)


def decode(path: Path, shape: Shape, intensity: Range | None = None) -> Tensor:
    """[C, H, W] of an image file in 0..255: turned as its EXIF says, transparency on white, resized.

    uint8; with ``intensity`` float32, and what 16-bit, 32-bit and float images hold is spread from that range. Without
    one such an image is taken by the full range of 16 bits. UserError names the file: missing, unreadable, empty, no
    image, truncated, too large, not finite.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: not a plain file.")
        if found.st_size == 0:
            raise UserError(f"{path}: empty file (0 bytes). Remove it, or use on_bad_sample: skip.")
        with opened(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UserError(f"{path}: {image.width} x {image.height} pixels; at most {MOST_PIXELS:,} are read.")
            array = _pixels(ImageOps.exif_transpose(image), path, shape, intensity)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image, or cut off. Remove it, or use on_bad_sample: skip.") from None
    except DAMAGED as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}). Remove it, or use on_bad_sample: skip.") from None
    return torch.from_numpy(array.reshape(shape[1], shape[2], -1).copy()).permute(2, 0, 1).contiguous()


def decode_bytes(data: bytes, where: str, shape: Shape) -> Tensor:
    """uint8 [C, H, W] of an encoded image that lies in memory, as `decode` makes it. UserError names ``where``."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UserError(f"{where}: {image.width} x {image.height} pixels; at most {MOST_PIXELS:,} are read.")
            array = _pixels(ImageOps.exif_transpose(image), Path(where), shape, None)
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(f"{where}: not an image, or cut off ({str(error)[:100]}).") from None
    return torch.from_numpy(array.reshape(shape[1], shape[2], -1).copy()).permute(2, 0, 1).contiguous()


def _pixels(image: Image.Image, path: Path, shape: Shape, intensity: Range | None) -> NDArray[Any]:
    """[H, W] or [H, W, C] at the wanted size."""
    size = (shape[2], shape[1])
    if not is_deep(image):
        resized = np.asarray(_eight_bits(image, shape[0]).resize(size, Image.Resampling.BILINEAR), dtype=np.uint8)
        return resized if intensity is None else resized.astype(np.float32)
    low, high = intensity or (0.0, 65535.0)
    values = Image.fromarray(_finite(image, path).astype(np.float32))
    spread = (np.asarray(values.resize(size, Image.Resampling.BILINEAR)) - low) / (high - low) * 255
    spread = np.repeat(spread.clip(0, 255)[..., None], shape[0], axis=2)
    return spread.round().astype(np.uint8) if intensity is None else spread.astype(np.float32)


def is_deep(image: Image.Image) -> bool:
    """Does a pixel hold more than eight bits: a 16-bit, 32-bit or float image?"""
    return image.mode.startswith(("I", "F"))


def _finite(image: Image.Image, path: Path) -> NDArray[Any]:
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise UserError(f"{path}: holds NaN or infinity. Remove it, or use on_bad_sample: skip.")
    return values


def _eight_bits(image: Image.Image, channels: int) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("L" if channels == 1 else "RGB")
