"""Drawn objects with their boxes: discs, squares and triangles on a textured ground, up to four in an image.

A stand-in for detection, made where it is used. The unseen domain has less contrast: a brighter ground and paler
objects. Some images are empty. An object lies in a quarter of its own, so that none hides another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatcompress.data.embedded.drawing import inked, pictures, plane, texture
from flatcompress.data.raw_data import RawData
from flatcompress.errors import UserError

CLASSES = ("disc", "square", "triangle")
_QUARTERS = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))
_SHARE = 0.45  # of the quarters hold an object


def drawn_objects(
    seed: int, *, size: int = 48, train_count: int = 800, val_count: int = 100, test_count: int = 200
) -> RawData:
    """Images of ``size`` pixels; the counts are images, and the unseen domain has ``test_count``."""
    if not 24 <= size <= 256 or size % 4:
        raise UserError(f"drawn-objects: size must be a multiple of 4 between 24 and 256, found {size}")
    counts = (train_count, val_count, test_count)
    return pictures(
        seed, "drawn-objects", counts, ("clear", "haze"), CLASSES, lambda *given: _drawn(size, *given), "detection"
    )


def _drawn(size: int, n: int, rng: torch.Generator, haze: bool) -> tuple[Tensor, None, Tensor]:
    """uint8 [N, 3, size, size], no labels, and the boxes [N, 4, 6] of `tasks.detection`."""
    y, x = plane(size)
    picture = (0.3 if haze else 0.12) + 0.28 * texture(n, size // 4, size, rng)
    boxes = torch.zeros(n, len(_QUARTERS), 6)
    for i, (middle_x, middle_y) in enumerate(_QUARTERS):
        there = torch.rand(n, generator=rng) < _SHARE
        kind = torch.randint(0, len(CLASSES), (n,), generator=rng)
        reach = 0.09 + 0.12 * torch.rand(n, generator=rng)
        free = 0.24 - reach
        cx = middle_x + free * (2 * torch.rand(n, generator=rng) - 1)
        cy = middle_y + free * (2 * torch.rand(n, generator=rng) - 1)
        inside = _inside(x, y, kind, cx.view(-1, 1, 1), cy.view(-1, 1, 1), reach.view(-1, 1, 1))
        colour = (0.55 if haze else 0.5) + (0.35 if haze else 0.5) * torch.rand(n, 3, 1, 1, generator=rng)
        picture = torch.where((inside & there.view(-1, 1, 1))[:, None], colour, picture)
        label = torch.where(there, kind, -1).float()
        boxes[:, i] = torch.stack([label, cx - reach, cy - reach, cx + reach, cy + reach, torch.zeros(n)], 1)
    return inked(picture, 0.03, rng), None, boxes


def _inside(x: Tensor, y: Tensor, kind: Tensor, cx: Tensor, cy: Tensor, reach: Tensor) -> Tensor:
    """[N, size, size]: the pixels of a disc, a square, or a triangle that stands on its side; each fills its box."""
    dx, dy = x - cx, y - cy
    which = kind.view(-1, 1, 1)
    disc = dx**2 + dy**2 < reach**2
    square = torch.maximum(dx.abs(), dy.abs()) < reach
    triangle = square & (dx.abs() < (dy + reach) / 2)
    return torch.where(which == 0, disc, torch.where(which == 1, square, triangle))
