"""The smallest network that has everything the stages look at: two convolutions, a shortcut, BatchNorm, a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TinyNet(nn.Module):
    """[B, 1, 8, 8] -> logits [B, classes]."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)) + x)
        return self.fc(self.pool(x).flatten(1))


def build(num_classes: int, width: int = 8) -> nn.Module:
    """A factory for a recipe's ``model.name``, the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return TinyNet(num_classes, width)
