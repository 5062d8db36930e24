"""How the values of one activation are distributed: collected in two passes, so that the bins fit the range."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flatcompress.errors import UserError

POINTS = 4096


class Histogram:
    """Counts of values at evenly spaced points that include zero, where a ReLU puts most of them.

    `widen` with every batch first, then `count` with every batch. ``points``: [n] float64; ``counts``: [n].
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.low, self.high = math.inf, -math.inf
        self.points = torch.zeros(0, dtype=torch.float64)
        self.counts = torch.zeros(0, dtype=torch.float64)

    @torch.no_grad()
    def widen(self, values: Tensor) -> None:
        """Take the smallest and the largest value in. UserError for NaN and infinity, naming the quantizer."""
        low, high = (float(v) for v in torch.aminmax(values.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError(f"calibration data gives NaN or infinity at quantizer {self.name!r}.")
        self.low, self.high = min(self.low, low), max(self.high, high)

    @property
    def width(self) -> float:
        """Distance of two points."""
        return (max(self.high, 0.0) - min(self.low, 0.0)) / POINTS

    @torch.no_grad()
    def count(self, values: Tensor) -> None:
        """Add every value to the point nearest to it."""
        if not len(self.points):
            self._lay_out()
        if self.width == 0:
            self.counts += values.numel()
            return
        index = (values.detach().flatten() / self.width).round_().sub_(self._first).clamp_(0, len(self.points) - 1)
        self.counts += torch.bincount(index.long().cpu(), minlength=len(self.points))

    def _lay_out(self) -> None:
        width = self.width
        self._first = math.floor(min(self.low, 0.0) / width) if width else 0
        last = math.ceil(max(self.high, 0.0) / width) if width else 0
        self.points = torch.arange(self._first, last + 1, dtype=torch.float64) * (width or 1.0)
        self.counts = torch.zeros(len(self.points), dtype=torch.float64)
