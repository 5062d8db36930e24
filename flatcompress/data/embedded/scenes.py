"""Drawn scenes with their masks: discs and boxes on a textured ground, one class a pixel.

A stand-in for segmentation, made where it is used. Classes: ground, disc, box. The unseen domain has less
contrast: a brighter ground. The outermost pixels of every shape are 255 in the masks, as in
Pascal VOC: name them as the task's ``ignore_index``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatcompress.data.bundle import Part
from flatcompress.data.images.pixels import MemoryPixels
from flatcompress.data.raw_data import RawData
from flatcompress.errors import UserError
from flatcompress.randomness import generator

_SHAPES = 3  # a scene
VOID = 255


def drawn_scenes(
    seed: int, *, size: int = 32, train_count: int = 500, val_count: int = 80, test_count: int = 160
) -> RawData:
    """Scenes of ``size`` pixels; the counts are images, and the unseen domain has ``test_count``."""
    if not 16 <= size <= 256 or size % 4:
        raise UserError(f"drawn-scenes: size must be a multiple of 4 between 16 and 256, found {size}")
    counts = {"train": train_count, "val": val_count, "test": test_count, "haze": test_count}
    for name, count in counts.items():
        if not 8 <= count <= 1_000_000:
            raise UserError(f"drawn-scenes: {name}_count must be between 8 and 1,000,000, found {count}")
    parts = {name: _part(seed, name, count, size) for name, count in counts.items()}
    return RawData(
        ("ground", "disc", "box"),
        parts["train"],
        parts["val"],
        parts["test"],
        parts["haze"],
        ("clear", "haze"),
        "haze",
        task="segmentation",
    )


def _part(seed: int, name: str, count: int, size: int) -> Part:
    rng = generator(seed, "scenes", name)
    images, masks = _drawn(count, size, rng, dark=name == "haze")
    zeros = torch.zeros(count, dtype=torch.int64)
    return Part(MemoryPixels(images), torch.arange(count), zeros, zeros + (name == "haze"), torch.arange(count), masks)


def _drawn(n: int, size: int, rng: torch.Generator, dark: bool) -> tuple[Tensor, Tensor]:
    """uint8 [N, 3, size, size] and uint8 [N, size, size]."""
    axis = (torch.arange(size) + 0.5) / size
    y, x = axis.view(1, -1, 1), axis.view(1, 1, -1)
    texture = torch.rand(n, 3, size // 4, size // 4, generator=rng)
    picture = torch.nn.functional.interpolate(texture, scale_factor=4, mode="bilinear", align_corners=False)
    picture = (0.3 if dark else 0.15) + 0.25 * picture
    mask = torch.zeros(n, size, size, dtype=torch.uint8)
    for _ in range(_SHAPES):
        kind = torch.rand(n, 1, 1, generator=rng) < 0.5
        middle, reach = torch.rand(n, 2, 1, 1, generator=rng), 0.1 + 0.12 * torch.rand(n, 1, 1, generator=rng)
        dx, dy = (x - middle[:, 0]).abs(), (y - middle[:, 1]).abs()
        inside = torch.where(kind, reach - (dx**2 + dy**2).sqrt(), reach - torch.maximum(dx, dy))
        colour = (0.65 if dark else 0.6) + 0.35 * torch.rand(n, 3, 1, 1, generator=rng)
        picture = torch.where((inside > 0)[:, None], colour, picture)
        code = torch.where(kind, 1, 2).to(torch.uint8).expand(n, size, size)
        mask = torch.where(inside > 0, code, mask)
        mask = torch.where(inside.abs() < 0.35 / size, torch.tensor(VOID, dtype=torch.uint8), mask)
    picture = picture + 0.03 * torch.randn(picture.shape, generator=rng)
    return picture.clamp(0, 1).mul(255).round().to(torch.uint8), mask
