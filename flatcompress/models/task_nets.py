"""Small networks for tasks beside image classification, named in a recipe as ``flatcompress.models.task_nets:unet``."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError


def _block(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions with BatchNorm."""
    layers: list[nn.Module] = []
    for before in (inputs, outputs):
        layers += [nn.Conv2d(before, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """[B, C, H, W] -> [B, classes, H, W]: two levels down and up again, joined by concatenation (arXiv 1505.04597)."""

    def __init__(self, num_classes: int, channels: int, width: int) -> None:
        super().__init__()
        self.first, self.second = _block(channels, width), _block(width, 2 * width)
        self.bottom = _block(2 * width, 4 * width)
        self.down1, self.down2 = nn.MaxPool2d(2), nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.join2 = _block(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join1 = _block(2 * width, width)
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(self.down1(a))
        c = self.join2(torch.cat([self.up2(self.bottom(self.down2(b))), b], 1))
        return self.head(self.join1(torch.cat([self.up1(c), a], 1)))


def unet(num_classes: int, input_shape: tuple[int, ...], width: int = 12) -> nn.Module:
    """A U-Net of ``width`` channels at full size. UserError for sides that are no multiples of 4."""
    if len(input_shape) != 3 or input_shape[1] % 4 or input_shape[2] % 4:
        raise UserError(f"unet takes images whose sides are multiples of 4, found {tuple(input_shape)}.")
    return UNet(num_classes, input_shape[0], width)


def cnn1d(num_classes: int, input_shape: tuple[int, ...], width: int = 16, depth: int = 3) -> nn.Module:
    """Series [B, C, T] -> [B, classes]: ``depth`` strided convolutions, a mean over time and a linear layer."""
    if len(input_shape) != 2:
        raise UserError(f"cnn1d takes series [C, T], found {tuple(input_shape)}.")
    layers: list[nn.Module] = []
    channels = input_shape[0]
    for level in range(depth):
        wider = width * 2**level
        layers += [nn.Conv1d(channels, wider, 7 if level == 0 else 5, stride=2, padding=3 if level == 0 else 2)]
        layers += [nn.BatchNorm1d(wider), nn.ReLU()]
        channels = wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def autoencoder(input_shape: tuple[int, ...], width: int = 64, code: int = 8) -> nn.Module:
    """Features [B, F] -> [B, F] through ``code`` numbers, as MLPerf Tiny's anomaly detector (arXiv 2106.07597)."""
    if len(input_shape) != 1:
        raise UserError(f"autoencoder takes features [F], found {tuple(input_shape)}.")
    sides = [input_shape[0], width, width, code, width, width]
    layers: list[nn.Module] = []
    for before, after in pairwise(sides):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, input_shape[0]))
