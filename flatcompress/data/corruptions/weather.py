"""Weather: snow, frost, fog, and too much light. All procedural."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from flatcompress.data.corruptions.fields import fractal_field, gaussian_blur, line_blur, side, smooth_field, uniform


def snow(images: Tensor, severity: int, rng: Generator) -> Tensor:
    """Streaks of white flakes over a slightly whitened image."""
    share, whitening = ((0.02, 0.06), (0.04, 0.10), (0.06, 0.15), (0.09, 0.20), (0.13, 0.25))[severity - 1]
    flakes = (uniform((len(images), 1, *images.shape[-2:]), rng) < share).float()
    grown = gaussian_blur(flakes, 0.02 * side(images)) if side(images) >= 32 else flakes
    streaks = line_blur(grown, 0.12 * side(images), rng)
    streaks = (2.5 * streaks).clamp(0, 1)
    whitened = images + whitening * (1 - images)
    return whitened + (1 - whitened) * streaks


def frost(images: Tensor, severity: int, rng: Generator) -> Tensor:
    """Bright crystal ridges that grow inwards from the border."""
    strength = (0.20, 0.32, 0.44, 0.56, 0.68)[severity - 1]
    cells = 5
    ridges = (1 - smooth_field(images, cells, rng).abs() * 1.6).clamp(0, 1) ** 2
    ridges = torch.maximum(ridges, (1 - smooth_field(images, 2 * cells, rng).abs() * 1.8).clamp(0, 1) ** 2)
    height, width = images.shape[-2:]
    down, across = torch.linspace(-1, 1, height).view(-1, 1), torch.linspace(-1, 1, width)
    edge = torch.maximum(down.abs(), across.abs()).clamp(0.35, 1)
    cover = strength * edge * (0.35 + 0.65 * ridges)
    return images * (1 - cover) + 0.9 * cover


def fog(images: Tensor, severity: int, rng: Generator) -> Tensor:
    """A drifting cloud of light grey that takes away contrast."""
    strength = (0.20, 0.30, 0.40, 0.50, 0.60)[severity - 1]
    cover = strength * (0.5 + 0.5 * fractal_field(images, rng))
    return images * (1 - cover) + 0.85 * cover


def brightness(images: Tensor, severity: int, rng: Generator) -> Tensor:
    """Every pixel lighter by the same amount, clipped at white."""
    return images + (0.06, 0.12, 0.18, 0.25, 0.33)[severity - 1]
