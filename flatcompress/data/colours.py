"""Colour changes of images: one affine map of the colours of each image, in place of a pass for every change."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Maps:
    """One affine map of the colours of each image: ``matrix`` [B, C, C], and ``of_mean`` [B], which is added to every
    colour as a share of the image's mean, around which contrast works.
    """

    matrix: Tensor
    of_mean: Tensor

    def apply(self, images: Tensor, here: slice, mean: Tensor, std: Tensor, out: Tensor) -> None:
        """The images ``here`` [B, C, H, W], uint8 in 0..255 or float in 0..1, mapped, cut to 0..1 and normalised."""
        channels, unit = images.shape[1], 1 / 255 if images.dtype == torch.uint8 else 1.0
        weights = torch.zeros(len(images), channels, channels + 1)
        weights[:, :, :channels] = self.matrix[here] * (unit / std.view(-1, 1))
        shares = self.of_mean[here] * unit
        low, high = (-mean / std).flatten().tolist(), ((1 - mean) / std).flatten().tolist()
        pixels = torch.ones(channels + 1, images[0, 0].numel())  # the last row takes what is added
        for i, image in enumerate(images):
            pixels[:channels].copy_(image.view(channels, -1))
            weights[i, :, channels] = ((pixels[:channels].mean() * shares[i] - mean) / std).flatten()
            torch.mm(weights[i], pixels, out=out[i].view(channels, -1))
            for c in range(channels):
                out[i, c].clamp_(low[c], high[c])


def maps(jitter: Tensor, strength: float, grey: Tensor, channels: int) -> Maps:
    """Brightness, contrast, saturation and hue factors in 1 +- ``strength``, as DomainBed's colour jitter.

    jitter: draws [B, 4] in 0..1. grey: bool [B], images that lose all colour. All five changes are linear in a pixel's
    colours but for the image's mean.
    """
    bright, contrast, saturation = (1 + strength * (2 * jitter[:, :3] - 1)).unbind(1)
    scale, of_mean = (bright * contrast).view(-1, 1, 1), bright * (1 - contrast)
    if channels != 3:
        return Maps(scale * torch.eye(channels), of_mean)
    luminous = torch.tensor(LUMA).expand(3, 3)
    faded = torch.eye(3) * saturation.view(-1, 1, 1) + luminous * (1 - saturation).view(-1, 1, 1)
    # Rows of these matrices sum to 1, so a grey that is added stays what it is.
    matrix = scale * hue((2 * jitter[:, 3] - 1) * strength) @ faded
    return Maps(torch.where(grey.view(-1, 1, 1), luminous @ matrix, matrix), of_mean)


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
