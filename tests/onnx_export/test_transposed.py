"""A transposed convolution and its plain form are one function."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatcompress.graph import WeightSpec, rows
from flatcompress.onnx_export.lower import transposed


def by_plain(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the file computes: a plain convolution, its channels put side by side, the ends cut off."""
    weight = module.weight.detach()
    spec = WeightSpec(weight, torch.ones(weight.shape[1]), 8, axis=1)
    values, pixels = transposed.plain(rows(spec, module.groups)[0], module)
    rank, each = len(pixels.strides), values.shape[0] // module.out_channels
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
    bias = module.bias.repeat_interleave(each)
    y = conv(F.pad(x, pixels.pads), values, bias, dilation=pixels.dilations, groups=module.groups)
    y = y.unflatten(1, (-1, *pixels.strides))
    y = y.permute(0, 1, *(a for i in range(rank) for a in (2 + rank + i, 2 + i)))
    for axis in range(rank):
        y = y.flatten(2 + axis, 3 + axis)
    for axis, (begin, end) in enumerate(pixels.cuts):
        y = y.narrow(2 + axis, begin, y.shape[2 + axis] - begin - end)
    return y


@pytest.mark.parametrize(("kernel", "stride"), list(itertools.product((1, 2, 3, 4, 5), (1, 2, 3))))
def test_the_plain_form_of_a_transposed_convolution_is_equal(kernel, stride):
    torch.manual_seed(0)
    for padding, dilation, groups in itertools.product(range(kernel), (1, 2), (1, 2)):
        for extra in range(max(stride, dilation)):
            module = nn.ConvTranspose1d(4, 6, kernel, stride, padding, extra, groups, dilation=dilation).double()
            x = torch.randn(2, 4, 7).double()
            if (7 - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra + 1 > 0:
                torch.testing.assert_close(by_plain(module, x), module(x))


def test_it_is_equal_in_two_and_three_dimensions_with_uneven_settings():
    torch.manual_seed(0)
    image = nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), groups=2).double()
    x = torch.randn(2, 4, 5, 6).double()
    torch.testing.assert_close(by_plain(image, x), image(x))
    volume = nn.ConvTranspose3d(2, 3, (2, 3, 4), (2, 1, 2), (0, 1, 1)).double()
    x = torch.randn(1, 2, 3, 4, 5).double()
    torch.testing.assert_close(by_plain(volume, x), volume(x))
