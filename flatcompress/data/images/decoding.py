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
import torch.nn.functional as F
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
_MOST_FILE = 256 << 20  # bytes of a JPEG that is read at once
_ORIENTATION = 0x0112  # EXIF: how the camera was held


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
    one such an image is taken by the full range of 16 bits. A JPEG is decoded by simplejpeg where that is installed, to
    the very pixels that Pillow gives. UserError names the file: missing, unreadable, empty, no image, truncated, too
    large, not finite.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: not a plain file.")
        if found.st_size == 0:
            raise UserError(f"{path}: empty file (0 bytes). Remove it, or use on_bad_sample: skip.")
        if not is_jpeg(path) or found.st_size > _MOST_FILE:
            with opened(path) as image:
                return _sized(image, str(path), shape, intensity)
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            return _sized(image, str(path), shape, intensity, data)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image, or cut off. Remove it, or use on_bad_sample: skip.") from None
    except DAMAGED as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}). Remove it, or use on_bad_sample: skip.") from None


def decode_bytes(data: bytes, where: str, shape: Shape) -> Tensor:
    """uint8 [C, H, W] of an encoded image that lies in memory, as `decode` makes it. UserError names ``where``."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _sized(image, where, shape, None, data)
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(f"{where}: not an image, or cut off ({str(error)[:100]}).") from None


def is_jpeg(path: Path) -> bool:
    """Does the file's suffix say that it is a JPEG?"""
    return path.suffix.lower() in (".jpg", ".jpeg", ".jpe", ".jfif")


def _sized(image: Image.Image, where: str, shape: Shape, intensity: Range | None, data: bytes | None = None) -> Tensor:
    """The pixels of an opened ``image`` at the wanted size; ``data``: its file, where that lies in memory."""
    if image.width * image.height > MOST_PIXELS:
        raise UserError(f"{where}: {image.width} x {image.height} pixels; at most {MOST_PIXELS:,} are read.")
    quick = None if data is None or shape[0] != 3 else _jpeg(image, data)
    if quick is not None:
        return resized(quick, shape) if intensity is None else resized(quick, shape).float()
    turned = ImageOps.exif_transpose(image)
    if is_deep(turned):
        return _deep(turned, where, shape, intensity)
    pixels = np.array(_eight_bits(turned, shape[0]))
    found = resized(pixels.reshape(*pixels.shape[:2], -1), shape)
    return found if intensity is None else found.float()


def resized(pixels: NDArray[Any], shape: Shape) -> Tensor:
    """uint8 [C, H, W] of ``pixels`` [h, w, C]: bilinear, averaging what lies below a pixel where it shrinks.

    torch's resize in eight bits: within one level of Pillow's, in a third of its time.
    """
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    if image.shape[1:] != shape[1:]:
        image = F.interpolate(image[None], size=shape[1:], mode="bilinear", antialias=True)[0]
    return image.contiguous()


@cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def decodes_jpeg() -> bool:
    """Is the decoder of the extra ``jpeg`` installed?"""
    return _simplejpeg() is not None


def _jpeg(image: Image.Image, data: bytes) -> NDArray[Any] | None:
    """The pixels [h, w, 3] of an upright JPEG in colour; None for others, which Pillow reads."""
    if _simplejpeg() is None or image.format != "JPEG" or image.mode != "RGB":
        return None
    if image.getexif().get(_ORIENTATION, 1) != 1:
        return None
    try:
        return _simplejpeg().decode_jpeg(data)  # type: ignore[no-any-return]
    except (ValueError, RuntimeError):
        return None  # damaged: Pillow says how, or reads what there is


def _deep(image: Image.Image, where: str, shape: Shape, intensity: Range | None) -> Tensor:
    low, high = intensity or (0.0, 65535.0)
    values = Image.fromarray(_finite(image, where).astype(np.float32))
    spread = (np.asarray(values.resize((shape[2], shape[1]), Image.Resampling.BILINEAR)) - low) / (high - low) * 255
    spread = np.repeat(spread.clip(0, 255)[None], shape[0], axis=0)
    return torch.from_numpy(spread.round().astype(np.uint8) if intensity is None else spread.astype(np.float32))


def is_deep(image: Image.Image) -> bool:
    """Does a pixel hold more than eight bits: a 16-bit, 32-bit or float image?"""
    return image.mode.startswith(("I", "F"))


def _finite(image: Image.Image, where: str) -> NDArray[Any]:
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise UserError(f"{where}: holds NaN or infinity. Remove it, or use on_bad_sample: skip.")
    return values


def _eight_bits(image: Image.Image, channels: int) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("L" if channels == 1 else "RGB")
