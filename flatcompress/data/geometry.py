"""Crop, shift and flip of images: a box of whole pixels, brought back to the image's size, perhaps mirrored.

The box is cut out and resized as torchvision's RandomResizedCrop does it, on the eight bits that images are stored in:
a fractional box costs a grid and four gathers a pixel in float32, several times the whole of the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Boxes:
    """Where in its source each image comes from: ``corners`` int64 [B, 4] (left, top, width, height in pixels), which
    may lie beyond the border, and ``mirrored`` bool [B]; the source is ``size`` (height, width).
    """

    corners: Tensor
    mirrored: Tensor
    size: tuple[int, int]

    def theta(self) -> Tensor:
        """[B, 2, 3]: the same as the affine map of `torch.nn.functional.affine_grid`, sides from -1 to 1."""
        height, width = self.size
        left, top, wide, tall = self.corners.float().unbind(1)
        theta = torch.zeros(len(left), 2, 3)
        theta[:, 0, 0] = wide / width * torch.where(self.mirrored, -1.0, 1.0)
        theta[:, 0, 2] = (2 * left + wide) / width - 1
        theta[:, 1, 1] = tall / height
        theta[:, 1, 2] = (2 * top + tall) / height - 1
        return theta

    def cut(self, images: Tensor, here: slice = slice(None)) -> Tensor:
        """The boxes ``here`` of ``images`` [B, C, H, W], uint8 or float, at the size of the source."""
        found = torch.empty_like(images)
        rows = zip(images, self.corners[here].tolist(), self.mirrored[here].tolist())
        for i, (image, corners, mirrored) in enumerate(rows):
            piece = _cut(image, corners)
            found[i] = piece.flip(2) if mirrored else piece
        return found


def boxes(draws: Tensor, size: tuple[int, int], crop: float, shift: float, flip: float) -> Boxes:
    """Boxes from uniform numbers [B, 5]: area, aspect, place across and down, mirror.

    crop: the smallest share of the area, with sides up to 4 : 3 (0: all of it). shift: how far the box may lie beyond
    the border, as a share of the side. flip: probability of a mirrored image.
    """
    height, width = size
    ones = torch.ones(len(draws))
    area = 1 - draws[:, 0] * (1 - crop) if crop else ones
    aspect = torch.exp((2 * draws[:, 1] - 1) * math.log(4 / 3) / 2) if crop else ones
    wide = ((area.sqrt() * aspect).clamp(max=1) * width).round().clamp(min=1)
    tall = ((area.sqrt() / aspect).clamp(max=1) * height).round().clamp(min=1)
    left = draws[:, 2] * (width - wide + 2 * shift * width) - shift * width
    top = draws[:, 3] * (height - tall + 2 * shift * height) - shift * height
    corners = torch.stack([left.round(), top.round(), wide, tall], 1).long()
    return Boxes(corners, draws[:, 4] < flip, size)


def _cut(image: Tensor, corners: list[int]) -> Tensor:
    left, top, wide, tall = corners
    height, width = image.shape[1:]
    inside = left >= 0 and top >= 0 and left + wide <= width and top + tall <= height
    if inside:
        found = image[:, top : top + tall, left : left + wide]
    else:
        found = image.new_zeros(image.shape[0], tall, wide)
        y, x, below, right = max(0, top), max(0, left), min(height, top + tall), min(width, left + wide)
        found[:, y - top : below - top, x - left : right - left] = image[:, y:below, x:right]
    if (tall, wide) != (height, width):
        found = found.contiguous()  # else torch turns it to channels last and back, twice the time
        found = F.interpolate(found[None], size=(height, width), mode="bilinear", antialias=True)[0]
    return found
