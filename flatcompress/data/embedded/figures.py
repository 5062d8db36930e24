"""Drawn figures: is there a person in the picture? Stick figures among discs, boxes and posts on a textured ground.

A stand-in for visual wake words (arXiv 1906.05721), made where it is used. Every picture has clutter; half of them
have a figure with a head, a trunk, two arms and two legs. The unseen domain is the night: dark, with less contrast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatcompress.data.embedded.drawing import inked, pictures, plane, texture
from flatcompress.data.raw_data import RawData
from flatcompress.errors import UserError

CLASSES = ("nobody", "person")
_CLUTTER = 3


def drawn_figures(
    seed: int, *, size: int = 32, train_count: int = 800, val_count: int = 120, test_count: int = 240
) -> RawData:
    """Pictures of ``size`` pixels; the counts are pictures, and the unseen domain has ``test_count``."""
    if not 24 <= size <= 256:
        raise UserError(f"drawn-figures: size must be between 24 and 256, found {size}")
    counts = (train_count, val_count, test_count)
    return pictures(seed, "drawn-figures", counts, ("day", "night"), CLASSES, lambda *given: _drawn(size, *given))


def _drawn(size: int, n: int, rng: torch.Generator, night: bool) -> tuple[Tensor, Tensor, None]:
    """uint8 [N, 3, size, size] and the labels, every other one a person."""
    labels, (y, x) = torch.arange(n) % 2, plane(size)
    picture = 0.25 + 0.4 * texture(n, 6, size, rng)
    for _ in range(_CLUTTER):
        kind = torch.randint(0, 3, (n, 1, 1), generator=rng)
        place, reach = torch.rand(n, 2, 1, 1, generator=rng), 0.05 + 0.1 * torch.rand(n, 1, 1, generator=rng)
        dx, dy = (x - place[:, 0]).abs(), (y - place[:, 1]).abs()
        disc, box, post = dx**2 + dy**2 < reach**2, torch.maximum(dx, dy) < reach, (dx < 0.03) & (dy < 3 * reach)
        inside = torch.where(kind == 0, disc, torch.where(kind == 1, box, post))
        picture = torch.where(inside[:, None], torch.rand(n, 3, 1, 1, generator=rng), picture)
    person = _figure(x, y, n, rng) & (labels == 1).view(-1, 1, 1)
    picture = torch.where(person[:, None], torch.rand(n, 3, 1, 1, generator=rng) * 0.4, picture)
    picture = 0.05 + 0.35 * picture if night else picture
    return inked(picture, 0.02, rng), labels, None


def _figure(x: Tensor, y: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """[N, size, size]: where a figure is; tall as 0.4 to 0.7 of the picture, its limbs at any angle."""
    tall = 0.4 + 0.3 * torch.rand(n, 1, 1, generator=rng)
    cx = 0.25 + 0.5 * torch.rand(n, 1, 1, generator=rng)
    top = 0.04 + (0.92 - tall) * torch.rand(n, 1, 1, generator=rng)
    thick = 0.045 * tall + 0.012
    head = (x - cx) ** 2 + (y - top - 0.12 * tall) ** 2 < (0.12 * tall) ** 2
    neck, hip = top + 0.22 * tall, top + 0.6 * tall
    found = head | _limb(x, y, cx, neck, cx, hip, thick)
    for side in (-1.0, 1.0):
        swing = torch.rand(n, 2, 1, 1, generator=rng)
        arm = side * (0.12 + 0.16 * swing[:, 0]) * tall
        found = found | _limb(x, y, cx, neck + 0.05 * tall, cx + arm, neck + (0.35 - 0.45 * swing[:, 0]) * tall, thick)
        found = found | _limb(x, y, cx, hip, cx + side * (0.06 + 0.14 * swing[:, 1]) * tall, top + tall, thick)
    return found


def _limb(x: Tensor, y: Tensor, x0: Tensor, y0: Tensor, x1: Tensor, y1: Tensor, thick: Tensor) -> Tensor:
    """Nearer than ``thick`` to the line from one point to the other."""
    along_x, along_y = x1 - x0, y1 - y0
    share = ((x - x0) * along_x + (y - y0) * along_y) / (along_x**2 + along_y**2).clamp(min=1e-9)
    share = share.clamp(0, 1)
    return (x - x0 - share * along_x) ** 2 + (y - y0 - share * along_y) ** 2 < thick**2
