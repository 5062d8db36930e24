"""Noise of the sensor and of the channel: Gaussian, shot and impulse noise."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from flatcompress.data.corruptions.fields import uniform


def gaussian_noise(images: Tensor, severity: int, rng: Generator) -> Tensor:
    """Additive noise of one standard deviation for all pixels."""
    deviation = (0.05, 0.09, 0.14, 0.20, 0.28)[severity - 1]
    return images + deviation * torch.randn(images.shape, generator=rng)


def shot_noise(images: Tensor, severity: int, rng: Generator) -> Tensor:
    """Photon counting: Poisson with ``photons`` for a white pixel."""
    photons = (80, 35, 16, 8, 4)[severity - 1]
    return torch.poisson(images.clamp(0, 1) * photons, generator=rng) / photons


def impulse_noise(images: Tensor, severity: int, rng: Generator) -> Tensor:
    """Salt and pepper in a share of the values."""
    share = (0.015, 0.035, 0.065, 0.11, 0.18)[severity - 1]
    draw = uniform(tuple(images.shape), rng)
    return torch.where(draw < share / 2, 0.0, torch.where(draw < share, 1.0, images))
