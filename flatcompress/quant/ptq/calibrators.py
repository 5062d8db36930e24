"""Where an activation's grid ends: a calibrator turns a histogram into the range [low, high] that is represented.

``levels`` = (Qn, Qp, offset): with ``offset`` the grid lies anywhere around zero (Qn + Qp steps between low and high),
without it is symmetric, or starts at zero when Qn = 0. Zero is always inside, because it pads convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatcompress.quant.ptq.histogram import Histogram
from flatcompress.registry import Registry

CALIBRATORS = Registry("calibrator")
_CANDIDATES = 80
_PERCENTILE = 99.99
_ENTROPY_LEVELS = 128


@dataclass(frozen=True)
class Levels:
    """A grid's shape: ``qn`` steps below zero and ``qp`` above, or ``qn + qp`` steps anywhere with ``offset``."""

    qn: int
    qp: int
    offset: bool = False

    def step(self, low: float, high: float) -> float:
        """The step of the grid that spans [low, high]."""
        if self.offset:
            return (high - low) / (self.qn + self.qp)
        return max(high / self.qp, -low / self.qn if self.qn else 0.0)

    def rounded(self, values: Tensor, low: float, high: float) -> Tensor:
        """``values`` on the grid of [low, high]."""
        step = self.step(low, high)
        if step <= 0:
            return torch.zeros_like(values)
        zero = round(-low / step) if self.offset else 0
        qn, qp = (zero, self.qn + self.qp - zero) if self.offset else (self.qn, self.qp)
        return (values / step).round().clamp(-qn, qp) * step


def squared_error(found: Histogram, levels: Levels, low: float, high: float) -> float:
    """The mean squared error of the values that ``found`` has counted, on the grid of [low, high]."""
    error = (levels.rounded(found.points, low, high) - found.points).square()
    return float((error * found.counts).sum() / found.counts.sum().clamp_min(1))


def min_max(found: Histogram, levels: Levels) -> tuple[float, float]:
    """Everything that was seen (arXiv 1712.05877, section 3.1): nothing is clipped."""
    return min(found.low, 0.0), max(found.high, 0.0)


def percentile(found: Histogram, levels: Levels, percent: float = _PERCENTILE) -> tuple[float, float]:
    """All but the outermost 0.01 % of the values at either end (arXiv 1712.01048 clips at 99.9 and more)."""
    share = found.counts.cumsum(0) / found.counts.sum()
    tail = 1 - percent / 100
    last = len(found.points) - 1
    low = found.points[min(int((share <= tail).sum()), last)]
    high = found.points[min(int((share < 1 - tail).sum()), last)]
    return min(float(low), 0.0), max(float(high), 0.0)


def mse(found: Histogram, levels: Levels) -> tuple[float, float]:
    """The range of least squared error E[(Q(x) - x)^2] (OCS, arXiv 1901.09504, section 3.2), never above min-max's.

    A grid with an offset may give up its two ends by different shares: one end after the other, twice.
    """
    low, high = min_max(found, levels)
    best, ends = squared_error(found, levels, low, high), (low, high)
    shares = torch.linspace(1 / _CANDIDATES, 1, _CANDIDATES).tolist()

    def attempt(new: tuple[float, float]) -> None:
        nonlocal best, ends
        error = squared_error(found, levels, *new)
        if error < best:
            best, ends = error, new

    for share in shares:
        attempt((share * low, share * high))
    if levels.offset:
        for _ in range(2):
            for share in shares:
                attempt((share * low, ends[1]))
            for share in shares:
                attempt((ends[0], share * high))
    return ends


def entropy(found: Histogram, levels: Levels) -> tuple[float, float]:
    """The threshold T of least KL(P || Q) between the clipped |x| and itself in ``qp`` bins (Migacz, TensorRT 2017).

    P: the histogram up to T with everything beyond added to its last point; Q: its counts averaged within each of
    the grid's levels, over the points that are not empty. At most 128 levels, as published.
    """
    low, high = min_max(found, levels)
    counts = _magnitudes(found)
    quantized = min(max(levels.qp, levels.qn), _ENTROPY_LEVELS)
    if len(counts) <= quantized or float(counts.sum()) == 0:
        return low, high
    least, threshold = float("inf"), len(counts)
    for end in range(quantized, len(counts) + 1, max(1, len(counts) // 256)):
        divergence = _divergence(counts, end, quantized)
        if divergence < least:
            least, threshold = divergence, end
    limit = threshold * found.width
    return max(low, -limit), min(high, limit)


def _magnitudes(found: Histogram) -> Tensor:
    """Counts of |x| by distance from zero; zero itself left out, as it is exact on every grid."""
    index = (found.points / (found.width or 1.0)).round().abs().long()
    counts = torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add_(0, index, found.counts)
    return counts[1:]


def _divergence(counts: Tensor, end: int, levels: int) -> float:
    kept = counts[:end]
    p = kept.clone()
    p[-1] += counts[end:].sum()
    level = torch.arange(end) * levels // end
    filled = (p > 0).double()
    total = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, kept)
    places = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, filled)
    q = (total / places.clamp_min(1))[level] * filled
    if float(q.sum()) == 0:
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    inside = (p > 0) & (q > 0)
    missing = float(p[(p > 0) & (q == 0)].sum())
    return float((p[inside] * (p[inside] / q[inside]).log()).sum()) + missing * 50.0


CALIBRATORS.add("min-max", min_max, "the whole range that was seen", "1712.05877")
CALIBRATORS.add("percentile", percentile, "all but 0.01 % of the values at either end", "1712.01048")
CALIBRATORS.add("mse", mse, "the range of least squared error", "1901.09504")
CALIBRATORS.add("entropy", entropy, "the threshold of least KL divergence", "TensorRT 2017")
