"""Networks drawn from a grammar of layers and connections, for the property that nothing raw comes out of them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

ACTIVATIONS = [
    nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.ELU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus,
    nn.Hardtanh, nn.CELU, nn.Softsign, nn.LogSigmoid, nn.Identity,
]  # fmt: skip
NORMS = ["batch", "group", "instance", "none", "statistics"]
JOINS = ["plain", "add", "concat", "gate", "glu"]


class Same(nn.Conv2d):
    """Pads like TensorFlow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high, wide = (k - 1 for k in self.kernel_size)
        x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        return F.conv2d(x, self.weight, self.bias, 1, 0, 1, self.groups)


def convolution(kind: str, channels: int, kernel: int) -> nn.Module:
    """A convolution that keeps channels and size."""
    odd = kernel | 1
    if kind == "same":
        return Same(channels, channels, kernel)
    if kind == "transposed":
        return nn.ConvTranspose2d(channels, channels, odd, padding=odd // 2)
    made = nn.Conv2d(channels, channels, odd, padding=odd // 2, groups=channels if kind == "depthwise" else 1)
    return nn.utils.parametrizations.weight_norm(made) if kind == "weight norm" else made


class Block(nn.Module):
    """convolution, norm, activation, and how the result meets the block's input; [B, C, H, W] to the same."""

    def __init__(self, kind: str, kernel: int, norm: str, act: int, join: str, channels: int) -> None:
        super().__init__()
        self.conv, self.join = convolution(kind, channels, kernel), join
        self.norm: nn.Module = nn.Identity()
        if norm == "batch":
            self.norm = nn.BatchNorm2d(channels)
        elif norm == "group":
            self.norm = nn.GroupNorm(2, channels)
        elif norm == "instance":
            self.norm = nn.InstanceNorm2d(channels, affine=True)
        elif norm == "statistics":
            self.norm = nn.BatchNorm2d(channels, affine=False)
        self.act = ACTIVATIONS[act]()
        if join in ("concat", "glu"):
            self.mix = nn.Conv2d(2 * channels if join == "concat" else channels, channels * (1 + (join == "glu")), 1)
        if join == "gate":
            self.squeeze = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm(self.conv(x)))
        if self.join == "add":
            return x + y
        if self.join == "concat":
            return self.mix(torch.cat([x, y], 1))
        if self.join == "gate":
            return y * torch.sigmoid(self.squeeze(F.adaptive_avg_pool2d(y, 1)))
        if self.join == "glu":
            return F.glu(self.mix(y), 1)
        return F.dropout(y, 0.1, self.training)


class Net(nn.Module):
    """A stem, drawn blocks, a pool, a classifier; input [B, 3, 8, 8]."""

    def __init__(self, blocks: list[Block], pool: str, twice: bool) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 3, padding=1), nn.ModuleList(blocks)
        self.pool, self.twice, self.head = pool, twice, nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu_()
        for block in self.blocks:
            x = block(x)
        if self.twice:
            x = self.blocks[-1](x)
        if self.pool == "pool":
            x = F.adaptive_avg_pool2d(x, 1)
        else:
            x = x.mean((2, 3)) if self.pool == "mean" else x.amax((2, 3))
        return self.head(x.flatten(1))


@st.composite
def networks(draw: st.DrawFn) -> tuple[Net, int]:
    """A drawn network with drawn bits, its weights from a drawn seed."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    kinds = ["plain", "depthwise", "same", "transposed", "weight norm"]
    blocks = [
        Block(
            draw(st.sampled_from(kinds)), draw(st.integers(1, 3)), draw(st.sampled_from(NORMS)),
            draw(st.integers(0, len(ACTIVATIONS) - 1)), draw(st.sampled_from(JOINS)), 4,
        )
        for _ in range(draw(st.integers(1, 3)))
    ]  # fmt: skip
    net = Net(blocks, draw(st.sampled_from(["mean", "max", "pool"])), draw(st.booleans()))
    return net, draw(st.sampled_from([8, 4]))
