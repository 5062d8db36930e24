"""Rounded biases behind a transposed convolution, whose weights have their output channels second."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flatcompress import quant


@pytest.mark.parametrize("groups", [1, 2])
def test_biases_behind_a_transposed_convolution_are_rounded_per_output_channel(groups):
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=groups)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), up, nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.randn(4, 3, 8, 8)
    quant.quantize(net, 4, 4, example_input=x)
    quant.calibrate(net, [x])
    net.eval()
    before = net(x).detach()
    quant.set_bias_rounding(net, True)
    after = net(x).detach()
    assert after.shape == before.shape and not torch.equal(before, after)
    assert float((after - before).abs().max()) < float(before.abs().max())
