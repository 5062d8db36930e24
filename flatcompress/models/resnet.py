"""Residual networks: ResNet-8 (MLPerf Tiny), ResNet-20 (CIFAR), ResNet-18 and ResNet-50 (arXiv 1512.03385).

Up to 64 pixels a side the stem is a 3x3 convolution (CIFAR), above it 7x7 with stride 2 and a max pool.
ResNet-18 and ResNet-50 keep torchvision's parameter names and, above 64 pixels, its shapes, so that weights
trained elsewhere load by `weights`.
"""

from __future__ import annotations

from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.models.blocks import Shape, conv_norm, init_convolutions, positive

_SMALL = 64


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (figure 5, left)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(inputs, width, 3, stride)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = conv_norm(width, width, 3)
        self.downsample = _shortcut(inputs, width, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up, and a shortcut (figure 5, right; the stride is on the 3x3, as in torchvision)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1, self.bn1 = conv_norm(inputs, width, 1)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = conv_norm(width, width, 3, stride)
        self.relu2 = nn.ReLU()
        self.conv3, self.bn3 = conv_norm(width, outputs, 1)
        self.downsample = _shortcut(inputs, outputs, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        return self.relu3(self.bn3(self.conv3(y)) + self.downsample(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(*conv_norm(inputs, outputs, 1, stride))


class ResNet(nn.Module):
    """[B, C, H, W] -> logits [B, classes]. ``widths`` and ``depths``: one number per stage."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        widths: list[int],
        depths: list[int],
        num_classes: int,
        input_shape: Shape,
        stem_stride: int,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1, self.maxpool = _stem(input_shape, widths[0], stem_stride)
        self.relu = nn.ReLU()
        channels = widths[0]
        self.stages: list[str] = []
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = []
            for position in range(depth):
                blocks.append(block(channels, width, 2 if index and not position else 1))
                channels = width * block.expansion
            self.stages.append(f"layer{index + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(self.flatten(self.avgpool(x)))


def _stem(input_shape: Shape, width: int, stride: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    if stride not in (0, 1, 2):
        raise UserError(f"model option 'stem_stride' must be 1, 2, or 0 (by the image size), found {stride!r}")
    if stride or min(input_shape[1:]) <= _SMALL:
        conv, norm = conv_norm(input_shape[0], width, 3, stride or 1)
        return conv, norm, nn.Identity()
    conv, norm = conv_norm(input_shape[0], width, 7, 2)
    return conv, norm, nn.MaxPool2d(3, 2, 1)


def resnet8(num_classes: int, input_shape: Shape, *, width: int = 16, stem_stride: int = 0) -> nn.Module:
    """Three stages of one block, width, 2 width, 4 width channels. ``stem_stride`` 0: by the image size."""
    positive("width", width)
    widths = [width, 2 * width, 4 * width]
    return ResNet(BasicBlock, widths, [1, 1, 1], num_classes, input_shape, stem_stride)


def resnet20(num_classes: int, input_shape: Shape, *, width: int = 16, stem_stride: int = 0) -> nn.Module:
    """Three stages of three blocks, width, 2 width, 4 width channels; projection shortcuts."""
    positive("width", width)
    widths = [width, 2 * width, 4 * width]
    return ResNet(BasicBlock, widths, [3, 3, 3], num_classes, input_shape, stem_stride)


def resnet18(num_classes: int, input_shape: Shape, *, width: int = 64, stem_stride: int = 0) -> nn.Module:
    """Four stages of two basic blocks."""
    positive("width", width)
    widths = [width * 2**stage for stage in range(4)]
    return ResNet(BasicBlock, widths, [2, 2, 2, 2], num_classes, input_shape, stem_stride)


def resnet50(num_classes: int, input_shape: Shape, *, width: int = 64, stem_stride: int = 0) -> nn.Module:
    """Four stages of 3, 4, 6, 3 bottlenecks."""
    positive("width", width)
    widths = [width * 2**stage for stage in range(4)]
    return ResNet(Bottleneck, widths, [3, 4, 6, 3], num_classes, input_shape, stem_stride)
