"""How the values of one activation are distributed: its exact range, and an even pick of its values as a histogram."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flatcompress.errors import UserError

POINTS = 4096
SAMPLE = 16_384  # values kept of each batch


class Histogram:
    """Counts of values at evenly spaced points that include zero, where a ReLU puts most of them.

    `see` every batch, then `finish`. ``low``, ``high``: of everything seen. ``points``, ``counts``: [n] float64, of a
    pick of up to `SAMPLE` values a batch.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.low, self.high = math.inf, -math.inf
        self.points = torch.zeros(0, dtype=torch.float64)
        self.counts = torch.zeros(0, dtype=torch.float64)
        self._kept: list[Tensor] = []

    @torch.no_grad()
    def see(self, values: Tensor) -> None:
        """Take a batch in. UserError for NaN and infinity, naming the quantizer."""
        low, high = (float(v) for v in torch.aminmax(values.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError(f"calibration data gives NaN or infinity at quantizer {self.name!r}.")
        self.low, self.high = min(self.low, low), max(self.high, high)
        flat = values.detach().flatten()
        # An odd stride: channels and rows are most often even, and each must have its turn.
        stride = max(1, flat.numel() // SAMPLE) | 1
        self._kept.append(flat[::stride].float().cpu().clone())

    @property
    def width(self) -> float:
        """Distance of two points."""
        return (max(self.high, 0.0) - min(self.low, 0.0)) / POINTS

    @torch.no_grad()
    def finish(self) -> Histogram:
        """Count what was kept, every value at the point nearest to it."""
        width = self.width
        first = math.floor(min(self.low, 0.0) / width) if width else 0
        last = math.ceil(max(self.high, 0.0) / width) if width else 0
        self.points = torch.arange(first, last + 1, dtype=torch.float64) * (width or 1.0)
        values = torch.cat(self._kept).double()
        index = (values / (width or 1.0)).round_().sub_(first).clamp_(0, last - first)
        self.counts = torch.bincount(index.long(), minlength=last - first + 1).double()
        self._kept.clear()
        return self
