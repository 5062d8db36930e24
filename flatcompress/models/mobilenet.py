"""Depthwise-separable networks: MobileNetV1 at width 0.25 (MLPerf Tiny, arXiv 1704.04861) and MobileNetV2 (1801.04381).

Below 96 pixels the first strides are dropped until three pixels a side are left before the pool.
"""

from __future__ import annotations

from torch import Tensor, nn

from flatcompress.models.blocks import (
    Shape,
    conv_norm,
    conv_unit,
    fit_strides,
    init_convolutions,
    positive,
    round_channels,
)

# Output channels and stride of MobileNetV1's thirteen blocks at width 1 (table 1).
_V1 = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
# Expansion, output channels, repeats, first stride of MobileNetV2's stages at width 1 (table 2).
_V2 = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


class Separable(nn.Sequential):
    """Depthwise 3x3 and pointwise 1x1, each followed by BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = conv_unit(inputs, inputs, 3, stride, groups=inputs)
        self.pointwise = conv_unit(inputs, outputs, 1)


class MobileNetV1(nn.Module):
    """[B, C, H, W] -> logits [B, classes]."""

    def __init__(self, num_classes: int, input_shape: Shape, width: float) -> None:
        super().__init__()
        strides = fit_strides([2, *[stride for _, stride in _V1]], input_shape)
        channels = round_channels(32 * width)
        self.stem = conv_unit(input_shape[0], channels, 3, strides[0])
        self.blocks = nn.Sequential()
        for (outputs, _), stride in zip(_V1, strides[1:], strict=True):
            self.blocks.append(Separable(channels, round_channels(outputs * width), stride))
            channels = round_channels(outputs * width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.blocks(self.stem(x)))))


class InvertedResidual(nn.Module):
    """1x1 up, depthwise 3x3, linear 1x1 down; a shortcut where the shapes allow one."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers.append(conv_unit(inputs, hidden, 1, activation=nn.ReLU6))
        layers.append(conv_unit(hidden, hidden, 3, stride, hidden, nn.ReLU6))
        layers += conv_norm(hidden, outputs, 1)
        self.conv = nn.Sequential(*layers)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """[B, C, H, W] -> logits [B, classes]; parameter names and shapes are torchvision's."""

    def __init__(self, num_classes: int, input_shape: Shape, width: float) -> None:
        super().__init__()
        strides = fit_strides([2, *[stage[3] for stage in _V2]], input_shape)
        channels = round_channels(32 * width)
        self.features = nn.Sequential(conv_unit(input_shape[0], channels, 3, strides[0], activation=nn.ReLU6))
        for (expansion, outputs, repeats, _), stride in zip(_V2, strides[1:], strict=True):
            for position in range(repeats):
                block_stride = 1 if position else stride
                self.features.append(
                    InvertedResidual(channels, round_channels(outputs * width), block_stride, expansion)
                )
                channels = round_channels(outputs * width)
        last = round_channels(1280 * max(1.0, width))
        self.features.append(conv_unit(channels, last, 1, activation=nn.ReLU6))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        # Slot 0 is torchvision's dropout; an identity keeps the name of the layer after it.
        self.classifier = nn.Sequential(nn.Identity(), nn.Linear(last, num_classes))
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.pool(self.features(x))))


def mobilenet_v1_025(num_classes: int, input_shape: Shape, *, width: float = 0.25) -> nn.Module:
    """MobileNetV1 with a quarter of the channels, the MLPerf Tiny visual-wake-words network."""
    positive("width", width)
    return MobileNetV1(num_classes, input_shape, width)


def mobilenet_v2(num_classes: int, input_shape: Shape, *, width: float = 1.0) -> nn.Module:
    """MobileNetV2, channels times ``width`` rounded to eights."""
    positive("width", width)
    return MobileNetV2(num_classes, input_shape, width)
