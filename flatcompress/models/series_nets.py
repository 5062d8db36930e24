"""Networks for series, named in a recipe as ``flatcompress.models.series_nets:samformer``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError

_LEAST = 1e-5  # added to a window's variance


class Samformer(nn.Module):
    """Series [B, C, T] -> the next H steps of every channel, [B, C * H] (SAMformer, arXiv 2402.10198).

    One attention whose tokens are the channels, added to its input, then one linear layer over time that all channels
    share: f(X) = (X + softmax(X W_q (X W_k)^T / sqrt(d)) X W_v) W. Every channel of a window is normalised by its own
    mean and deviation, which the forecast is given back (RevIN, with a learned scale and shift a channel).
    """

    def __init__(self, channels: int, steps: int, horizon: int, dim: int) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.gain, self.shift = nn.Parameter(torch.ones(channels, 1)), nn.Parameter(torch.zeros(channels, 1))
        self.queries, self.keys = nn.Linear(steps, dim), nn.Linear(steps, dim)
        self.values = nn.Linear(steps, steps)
        self.softmax = nn.Softmax(dim=-1)
        self.forecast = nn.Linear(steps, horizon)
        self.flatten = nn.Flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        spread = ((x - mean).square().mean(-1, keepdim=True) + _LEAST).sqrt()
        h = (x - mean) / spread * self.gain + self.shift
        weights = self.softmax((self.queries(h) * self.scale) @ self.keys(h).transpose(-2, -1))
        ahead = self.forecast(h + weights @ self.values(h))
        return self.flatten((ahead - self.shift) / self.gain * spread + mean)


def samformer(num_classes: int, input_shape: tuple[int, ...], dim: int = 16) -> nn.Module:
    """`Samformer` with keys of ``dim`` numbers; ``num_classes`` is channels x steps ahead.

    UserError for what is no series, or a number of outputs that the channels do not divide.

    >>> samformer(3 * 8, (3, 48))(torch.zeros(2, 3, 48)).shape
    torch.Size([2, 24])
    """
    if len(input_shape) != 2:
        raise UserError(f"samformer takes series [C, T], found {tuple(input_shape)}.")
    channels, steps = input_shape
    if num_classes % channels:
        raise UserError(f"samformer forecasts as many steps of each of {channels} channels; {num_classes} is no such.")
    return Samformer(channels, steps, num_classes // channels, dim)
