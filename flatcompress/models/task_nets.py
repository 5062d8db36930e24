"""Small networks for tasks beside image classification, named in a recipe as ``flatcompress.models.task_nets:unet``."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.tasks.detection import EXTRA

_PRIOR = 0.01  # of a cell holding a box of a class, before anything is learned


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


class Detector(nn.Module):
    """[B, C, H, W] -> [B, classes + 5, H / 4, W / 4]: strided convolutions, then the head of `tasks.detection`."""

    def __init__(self, num_classes: int, channels: int, width: int, depth: int) -> None:
        super().__init__()
        sides = [channels, width, 2 * width, *[4 * width] * depth]
        layers: list[nn.Module] = []
        for level, (before, after) in enumerate(pairwise(sides)):
            layers += [nn.Conv2d(before, after, 3, stride=2 if level < 2 else 1, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Conv2d(sides[-1], num_classes + EXTRA, 1)
        with torch.no_grad():  # few cells hold anything: as in arXiv 1708.02002, section 4.1
            self.head.bias[:num_classes] = -math.log((1 - _PRIOR) / _PRIOR)  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def detector(num_classes: int, input_shape: tuple[int, ...], width: int = 12, depth: int = 3) -> nn.Module:
    """An anchor-free detector on one map of a quarter of the image's sides. UserError for what is no image of 16 up."""
    if len(input_shape) != 3 or min(input_shape[1:]) < 16:
        raise UserError(f"detector takes images of 16 pixels a side and more, found {tuple(input_shape)}.")
    return Detector(num_classes, input_shape[0], width, depth)


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
