"""Tools of the corruptions: smooth random fields, blurs and warps, in shares of the image side."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def side(images: Tensor) -> int:
    """The shorter side in pixels: lengths are given as shares of it, so that severity does not depend on resolution."""
    return min(images.shape[-2:])


def uniform(shape: tuple[int, ...], rng: Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform random numbers in [low, high)."""
    return torch.rand(shape, generator=rng) * (high - low) + low


def smooth_field(images: Tensor, cells: int, rng: Generator, channels: int = 1) -> Tensor:
    """Random [B, channels, H, W] of unit spread whose features are 1/``cells`` of the image."""
    coarse = torch.randn(len(images), channels, cells + 3, cells + 3, generator=rng)
    height, width = images.shape[-2:]
    # One spare cell a side: bicubic up-sampling flattens the border.
    margin = (math.ceil(height / cells), math.ceil(width / cells))
    big = F.interpolate(coarse, (height + 2 * margin[0], width + 2 * margin[1]), mode="bicubic", align_corners=False)
    return big[..., margin[0] : margin[0] + height, margin[1] : margin[1] + width]


def fractal_field(images: Tensor, rng: Generator, decay: float = 0.55) -> Tensor:
    """A cloud: fields at 2, 4, 8 ... cells, each ``decay`` as strong as the one before; [B, 1, H, W] in 0..1."""
    octaves = max(1, min(5, int(math.log2(side(images))) - 1))
    cloud = sum(decay**k * smooth_field(images, 2 ** (k + 1), rng) for k in range(octaves))
    assert isinstance(cloud, Tensor)
    low, high = cloud.amin((1, 2, 3), keepdim=True), cloud.amax((1, 2, 3), keepdim=True)
    return (cloud - low) / (high - low).clamp(min=1e-6)


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Blur by a Gaussian of ``sigma`` pixels, edges repeated."""
    if sigma < 0.1:
        return images
    radius = max(1, math.ceil(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    flat = images.reshape(-1, 1, *images.shape[-2:])
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="replicate"), kernel)
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="replicate"), kernel.transpose(2, 3))
    return flat.reshape(images.shape)


def base_grid(images: Tensor) -> Tensor:
    """The sampling grid [1, H, W, 2] that changes nothing."""
    identity = torch.eye(2, 3).unsqueeze(0)
    return F.affine_grid(identity, [1, 1, *images.shape[-2:]], align_corners=False)


def sample(images: Tensor, grid: Tensor, mode: str = "bilinear") -> Tensor:
    """Sample ``images`` at ``grid`` (-1..1), edges repeated."""
    grid = grid.expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, mode=mode, padding_mode="border", align_corners=False)


def line_blur(images: Tensor, length: float, rng: Generator) -> Tensor:
    """Average along a line of ``length`` pixels in a random direction, another one for each image."""
    angle = uniform((len(images), 1, 1), rng, 0, math.pi)
    height, width = images.shape[-2:]
    direction = torch.stack([torch.cos(angle) * 2 / width, torch.sin(angle) * 2 / height], -1)
    steps = max(3, 2 * math.ceil(length / 2) + 1)
    grid = base_grid(images)
    offsets = torch.linspace(-length / 2, length / 2, steps).tolist()
    return sum((sample(images, grid + offset * direction) for offset in offsets), torch.zeros(())) / steps
