"""Drawn gauges: a dial with a needle and a lamp; how far the needle has turned and how bright the lamp is are numbers.

A stand-in for regression from images, made where it is used. Two columns: ``turn`` in 0..1 from the left stop to the
right one, and ``lamp`` in 0..1. The unseen domain has the dial dark and the needle bright.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flatcompress.data.embedded.drawing import inked, pictures, plane
from flatcompress.data.raw_data import RawData
from flatcompress.errors import UserError

_SWEEP = math.radians(270)


def drawn_gauges(
    seed: int, *, size: int = 24, train_count: int = 1200, val_count: int = 200, test_count: int = 400
) -> RawData:
    """Gauges of ``size`` pixels; the counts are images, and the unseen domain has ``test_count``."""
    if not 16 <= size <= 256:
        raise UserError(f"drawn-gauges: size must be between 16 and 256, found {size}")
    counts = (train_count, val_count, test_count)
    return pictures(
        seed, "drawn-gauges", counts, ("light", "dark"), ("turn", "lamp"), lambda *g: _drawn(size, *g), "regression"
    )


def _drawn(size: int, n: int, rng: torch.Generator, dark: bool) -> tuple[Tensor, None, Tensor]:
    """uint8 [N, 3, size, size], no labels, and the targets [N, 2]."""
    targets = torch.rand(n, 2, generator=rng)
    y, x = (2 * axis - 1 for axis in plane(size))
    middle = 0.12 * (torch.rand(n, 2, 1, 1, generator=rng) - 0.5)
    x, y = x - middle[:, 0], y - middle[:, 1]
    angle = (targets[:, 0] - 0.5) * _SWEEP
    along = x * torch.sin(angle).view(-1, 1, 1) - y * torch.cos(angle).view(-1, 1, 1)
    across = x * torch.cos(angle).view(-1, 1, 1) + y * torch.sin(angle).view(-1, 1, 1)
    soft = 0.5 * size
    disc = (soft * (0.85 - (x**2 + y**2).sqrt())).clamp(0, 1)
    needle = (soft * (0.09 - across.abs())).clamp(0, 1) * (along > -0.1) * (soft * (0.7 - along)).clamp(0, 1)
    lamp = (soft * (0.16 - ((x**2) + (y - 0.5) ** 2).sqrt())).clamp(0, 1)
    face, hand = (0.15, 0.9) if dark else (0.85, 0.1)
    ground = 0.25 + 0.5 * torch.rand(n, 3, 1, 1, generator=rng)
    picture = ground * (1 - disc[:, None]) + face * disc[:, None]
    picture = picture * (1 - needle[:, None]) + hand * needle[:, None]
    glow = targets[:, 1].view(-1, 1, 1, 1) * torch.tensor([1.0, 0.25, 0.1]).view(1, 3, 1, 1)
    picture = picture * (1 - lamp[:, None]) + glow * lamp[:, None]
    return inked(picture, 0.02, rng), None, targets
