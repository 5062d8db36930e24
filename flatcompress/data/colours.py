"""Colour changes of images: one affine map of the colours of each image, in place of a pass for every change."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)


def luma(images: Tensor) -> Tensor:
    """[B, 1, H, W]: the brightness of images [B, 3, H, W] (ITU-R BT.601)."""
    red, green, blue = LUMA
    return images[:, 0:1].mul(red).add_(images[:, 1:2], alpha=green).add_(images[:, 2:3], alpha=blue)


def jitter(draws: Tensor, strength: float, channels: int) -> tuple[Tensor, Tensor]:
    """Brightness, contrast, saturation and hue factors in 1 +- ``strength``, as DomainBed's colour jitter.

    draws: [B, 4] in 0..1. Returns a matrix of the colours [B, C, C] and what is added to them, [B], as a share of the
    image's mean: all four changes are linear in a pixel's colours but for the mean, around which contrast works.
    """
    bright, contrast, saturation = (1 + strength * (2 * draws[:, :3] - 1)).unbind(1)
    scale, bias = (bright * contrast).view(-1, 1, 1), bright * (1 - contrast)
    if channels != 3:
        return scale * torch.eye(channels), bias
    grey = torch.tensor(LUMA).expand(3, 3)
    faded = torch.eye(3) * saturation.view(-1, 1, 1) + grey * (1 - saturation).view(-1, 1, 1)
    # Rows of both matrices sum to 1, so a grey that is added stays what it is.
    return scale * hue((2 * draws[:, 3] - 1) * strength) @ faded, bias


def jittered(images: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """Float images [B, C, H, W] in 0..1 whose colours are changed as `jitter` says."""
    added = (images.mean((1, 2, 3)) * bias).view(-1, 1, 1)
    return torch.baddbmm(added, matrix, images.flatten(2)).clamp_(0, 1).view(images.shape)


def hue(turns: Tensor) -> Tensor:
    """[B, 3, 3]: colours turned about the grey axis by ``turns`` of a circle (the YIQ approximation of a hue shift)."""
    cos, sin = torch.cos(2 * math.pi * turns), torch.sin(2 * math.pi * turns)
    third, root = (1 - cos) / 3, sin / math.sqrt(3)
    rows = [
        torch.stack([cos + third, third - root, third + root], 1),
        torch.stack([third + root, cos + third, third - root], 1),
        torch.stack([third - root, third + root, cos + third], 1),
    ]
    return torch.stack(rows, 1)


def greyed(images: Tensor, chosen: Tensor) -> Tensor:
    """The images under the mask ``chosen`` [B] without colour, in place."""
    for i in chosen.nonzero().flatten().tolist():
        images[i] = luma(images[i : i + 1])[0]
    return images
