"""Small networks for the tests of this folder."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """A residual block; ``final`` is the activation after the add (None: a linear bottleneck)."""

    def __init__(self, width: int, relu6: bool = False, final: bool = True) -> None:
        super().__init__()
        act = nn.ReLU6 if relu6 else nn.ReLU
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=width if relu6 else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = act(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = act() if final else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return y if self.act2 is None else self.act2(y)


class Net(nn.Module):
    """A stem, two blocks, a max pool, an average pool, a classifier; input [B, 3, 8, 8]."""

    input_shape = (3, 8, 8)

    def __init__(self, relu6: bool = False, final: bool = True, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.block1, self.block2 = Block(width, relu6, final), Block(width, relu6, final)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block2(self.block1(self.pool(self.act(self.bn(self.stem(x))))))
        return self.fc(self.dropout(self.average(x).flatten(1)))


class Encoder(nn.Module):
    """One attention block and one MLP on 4 tokens of 6 features; input [B, 4, 6]."""

    input_shape = (4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.embed, self.qkv, self.out = nn.Linear(6, 6), nn.Linear(6, 18), nn.Linear(6, 6)
        self.fc1, self.fc2, self.head = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 3)
        self.act = nn.GELU()
        self.position = nn.Parameter(torch.randn(1, 4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + self.position
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(((q * 0.4) @ k.transpose(1, 2)).softmax(-1) @ v)
        x = x + self.fc2(self.act(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


def trained(model: nn.Module, steps: int = 3, lr: float = 1e-3, seed: int = 0) -> nn.Module:
    """A few SGD steps on random data, in place."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model.train()
    for _ in range(steps):
        x = torch.randn(8, *model.input_shape, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model
