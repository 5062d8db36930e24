"""Blur: of a lens out of focus, of frosted glass, of motion, of zooming."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from flatcompress.data.corruptions.fields import base_grid, gaussian_blur, line_blur, sample, side, uniform


def defocus_blur(images: Tensor, severity: int, rng: Generator) -> Tensor:
    """Average over a disc, its edge softened by one pixel."""
    radius = (0.03, 0.05, 0.07, 0.095, 0.125)[severity - 1] * side(images)
    reach = math.ceil(radius)
    axis = torch.arange(-reach, reach + 1).float()
    distance = (axis.view(-1, 1) ** 2 + axis**2).sqrt()
    disc = (radius + 0.5 - distance).clamp(0, 1)
    kernel = (disc / disc.sum()).view(1, 1, *disc.shape)
    flat = images.reshape(-1, 1, *images.shape[-2:])
    return F.conv2d(F.pad(flat, (reach,) * 4, mode="replicate"), kernel).reshape(images.shape)


def glass_blur(images: Tensor, severity: int, rng: Generator) -> Tensor:
    """Every pixel taken from a random place nearby, between two slight blurs."""
    reach = (0.03, 0.05, 0.07, 0.09, 0.12)[severity - 1] * side(images)
    sizes = torch.tensor([2 / images.shape[-1], 2 / images.shape[-2]])
    jump = uniform((len(images), *images.shape[-2:], 2), rng, -reach, reach) * sizes
    blurred = gaussian_blur(images, 0.3 * reach)
    return gaussian_blur(sample(blurred, base_grid(images) + jump, "nearest"), 0.3 * reach)


def motion_blur(images: Tensor, severity: int, rng: Generator) -> Tensor:
    """Average along a line, in another direction for each image."""
    return line_blur(images, (0.08, 0.14, 0.20, 0.27, 0.35)[severity - 1] * side(images), rng)


def zoom_blur(images: Tensor, severity: int, rng: Generator) -> Tensor:
    """Average of the image at zooms from 1 to the severity's."""
    largest = (1.10, 1.18, 1.27, 1.38, 1.50)[severity - 1]
    zooms = torch.linspace(1, largest, 9).tolist()
    grid = base_grid(images)
    return sum((sample(images, grid / zoom) for zoom in zooms), torch.zeros(())) / len(zooms)
