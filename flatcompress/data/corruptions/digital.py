"""What processing does: contrast, elastic deformation, pixelation, JPEG; and things in the way."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from flatcompress.data.corruptions.fields import base_grid, sample, side, smooth_field, uniform

# The luminance table of the JPEG standard (ITU-T T.81, table K.1).
_QUANTIZATION = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""


def contrast(images: Tensor, severity: int, rng: Generator) -> Tensor:
    """Distances from the image's mean shrunk."""
    kept = (0.80, 0.65, 0.52, 0.40, 0.30)[severity - 1]
    mean = images.mean((2, 3), keepdim=True)
    return mean + kept * (images - mean)


def elastic_transform(images: Tensor, severity: int, rng: Generator) -> Tensor:
    """A smooth random displacement of about the given share of the side."""
    share = (0.020, 0.032, 0.044, 0.058, 0.075)[severity - 1]
    shift = smooth_field(images, 4, rng, channels=2).permute(0, 2, 3, 1) * 2 * share
    return sample(images, base_grid(images) + shift)


def pixelate(images: Tensor, severity: int, rng: Generator) -> Tensor:
    """Averaged down to a share of the resolution, and back in squares."""
    share = (0.75, 0.60, 0.48, 0.38, 0.30)[severity - 1]
    height, width = images.shape[-2:]
    small = F.interpolate(images, (max(1, round(height * share)), max(1, round(width * share))), mode="area")
    return F.interpolate(small, (height, width), mode="nearest-exact")


def jpeg_compression(images: Tensor, severity: int, rng: Generator) -> Tensor:
    """The lossy step of JPEG (8x8 cosine transform, quantization), without chroma subsampling.

    Blocks are 8 pixels at any resolution, as in the file format.
    """
    quality = (40, 25, 16, 10, 7)[severity - 1]
    table = (_table() * (5000 / quality) / 100).round().clamp(1, 255)
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % 8, 0, -height % 8), mode="replicate") * 255 - 128
    blocks = padded.unfold(2, 8, 8).unfold(3, 8, 8)  # [B, C, rows, columns, 8, 8]
    basis = _cosines()
    coefficients = ((basis @ blocks @ basis.T) / table).round() * table
    restored = (basis.T @ coefficients @ basis + 128) / 255
    return restored.transpose(3, 4).reshape(padded.shape)[..., :height, :width]


@functools.cache
def _table() -> Tensor:
    return torch.tensor([float(value) for value in _QUANTIZATION.split()]).view(8, 8)


@functools.cache
def _cosines() -> Tensor:
    """The orthonormal 8-point cosine transform."""
    k, n = torch.arange(8).view(-1, 1), torch.arange(8)
    basis = torch.cos(math.pi * (2 * n + 1) * k / 16) * math.sqrt(2 / 8)
    basis[0] /= math.sqrt(2)
    return basis


def occlusion(images: Tensor, severity: int, rng: Generator) -> Tensor:
    """A grey square somewhere, of the given share of the side."""
    share = (0.20, 0.27, 0.34, 0.42, 0.50)[severity - 1]
    height, width = images.shape[-2:]
    edge = max(1, round(share * side(images)))
    top = (uniform((len(images), 1, 1, 1), rng) * (height - edge + 1)).floor()
    left = (uniform((len(images), 1, 1, 1), rng) * (width - edge + 1)).floor()
    rows, columns = torch.arange(height).view(-1, 1), torch.arange(width)
    covered = (rows >= top) & (rows < top + edge) & (columns >= left) & (columns < left + edge)
    return torch.where(covered, 0.5, images)
