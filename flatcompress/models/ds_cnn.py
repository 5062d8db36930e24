"""DS-CNN, the MLPerf Tiny keyword-spotting network (arXiv 1711.07128): one convolution, four separable blocks."""

from __future__ import annotations

from torch import Tensor, nn

from flatcompress.models.blocks import Shape, init_convolutions, positive
from flatcompress.models.mobilenet import Separable


class DSCNN(nn.Module):
    """[B, C, H, W] -> logits [B, classes].

    The published 10x4 first kernel belongs to spectrograms (49 frames by 10 coefficients); squarer inputs get 3x3.
    """

    def __init__(self, num_classes: int, input_shape: Shape, width: int, depth: int) -> None:
        super().__init__()
        _, height, breadth = input_shape
        if height >= 2 * breadth and breadth >= 4:
            kernel, padding = (10, 4), (5, 1)
        else:
            kernel, padding = (3, 3), (1, 1)
        stride = 2 if min(height, breadth) >= 8 else 1
        self.stem = nn.Sequential(
            nn.Conv2d(input_shape[0], width, kernel, stride, padding, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(*[Separable(width, width) for _ in range(depth)])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(width, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.blocks(self.stem(x)))))


def ds_cnn(num_classes: int, input_shape: Shape, *, width: int = 64, depth: int = 4) -> nn.Module:
    """DS-CNN with ``depth`` separable blocks of ``width`` channels; no dropout."""
    positive("width", width)
    positive("depth", depth)
    return DSCNN(num_classes, input_shape, width, depth)
