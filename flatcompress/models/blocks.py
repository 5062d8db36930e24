"""What the architectures share: shapes, checks, the conv + norm + activation unit, and strides for small images."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from flatcompress.errors import UserError

Shape = tuple[int, int, int]  # channels, height, width


def positive(name: str, value: float) -> None:
    """UserError unless ``value`` is above zero."""
    if not value > 0:
        raise UserError(f"model option {name!r} must be above 0, found {value!r}")


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size (but for ``stride``) and its BatchNorm; no bias, the norm has one."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def conv_unit(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Convolution, BatchNorm, activation."""
    return nn.Sequential(*conv_norm(inputs, outputs, kernel, stride, groups), activation())


def fit_strides(strides: list[int], shape: Shape, smallest: int = 3) -> list[int]:
    """The strides with the earliest ones set to 1 until ``smallest`` pixels a side are left at the end.

    A 32-pixel image under a total stride of 32 would end as one pixel; CIFAR variants of the same nets drop the
    first strides, as this does. From 96 pixels on the published strides are kept.

    >>> fit_strides([2, 1, 2, 2, 2, 2], (3, 32, 32))
    [1, 1, 1, 2, 2, 2]
    """
    allowed = max(0, int(math.log2(max(1.0, min(shape[1:]) / smallest))))
    fitted = list(strides)
    for index in range(len(fitted)):
        if sum(stride > 1 for stride in fitted) <= allowed:
            break
        fitted[index] = 1
    return fitted


def round_channels(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of ``divisor``, never more than 10 % below ``channels`` (arXiv 1801.04381)."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def init_convolutions(model: nn.Module) -> None:
    """He initialisation by fan-out for every convolution; norms start as the identity (arXiv 1502.01852)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
