"""Drawn scenes with their masks: discs and boxes on a textured ground, one class a pixel.

A stand-in for segmentation, made where it is used. Classes: ground, disc, box. The unseen domain has less
contrast: a brighter ground. The outermost pixels of every shape are 255 in the masks, as in
Pascal VOC: name them as the task's ``ignore_index``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatcompress.data.embedded.drawing import inked, pictures, plane, texture
from flatcompress.data.raw_data import RawData
from flatcompress.errors import UserError

_SHAPES = 3  # a scene
VOID = 255


def drawn_scenes(
    seed: int, *, size: int = 32, train_count: int = 500, val_count: int = 80, test_count: int = 160
) -> RawData:
    """Scenes of ``size`` pixels; the counts are images, and the unseen domain has ``test_count``."""
    if not 16 <= size <= 256 or size % 4:
        raise UserError(f"drawn-scenes: size must be a multiple of 4 between 16 and 256, found {size}")
    counts, names = (train_count, val_count, test_count), ("ground", "disc", "box")
    return pictures(
        seed, "drawn-scenes", counts, ("clear", "haze"), names, lambda *given: _drawn(size, *given), "segmentation"
    )


def _drawn(size: int, n: int, rng: torch.Generator, dark: bool) -> tuple[Tensor, None, Tensor]:
    """uint8 [N, 3, size, size], no labels, and uint8 [N, size, size]."""
    y, x = plane(size)
    picture = (0.3 if dark else 0.15) + 0.25 * texture(n, size // 4, size, rng)
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
    return inked(picture, 0.03, rng), None, mask
