"""One scale per row of a weight: how it is found. A row is an output channel, or the whole tensor.

A weight scale gets ``rows`` [n, elements], the levels (Qn, Qp) and returns scales [n] > 0 (0 for an empty row).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flatcompress.registry import Registry

WEIGHT_SCALES = Registry("weight scale")
_CANDIDATES = 100


def rounded(rows: Tensor, scale: Tensor, qn: int, qp: int) -> Tensor:
    """``rows`` on the grid of ``scale`` [n]; a row without a scale is zero."""
    step = scale.unsqueeze(1).clamp_min(torch.finfo(rows.dtype).tiny)
    return (rows / step).round().clamp(-qn, qp) * step


def min_max(rows: Tensor, qn: int, qp: int) -> Tensor:
    """max|w| / Qp: no weight is clipped."""
    return rows.abs().amax(1) / qp


def mse(rows: Tensor, qn: int, qp: int) -> Tensor:
    """The scale of least squared error ||Q(w) - w||^2, never above min-max's (LAPQ, arXiv 1911.07190, section 3.1).

    A hundred clipping points of every row, then two steps of s = <w, q> / <q, q>, which is the best scale for the
    integers q as they are.
    """
    largest = min_max(rows, qn, qp)
    best, error = largest.clone(), _error(rows, largest, qn, qp)
    for share in torch.linspace(1, 0.2, _CANDIDATES).tolist():
        best, error = _better(rows, best, error, largest * share, qn, qp)
    for _ in range(2):
        step = best.unsqueeze(1).clamp_min(torch.finfo(rows.dtype).tiny)
        q = (rows / step).round().clamp(-qn, qp)
        fitted = (rows * q).sum(1) / q.square().sum(1).clamp_min(1)
        best, error = _better(rows, best, error, fitted, qn, qp)
    return best


def _error(rows: Tensor, scale: Tensor, qn: int, qp: int) -> Tensor:
    return (rounded(rows, scale, qn, qp) - rows).square().sum(1)


def _better(
    rows: Tensor, best: Tensor, error: Tensor, attempt: Tensor, qn: int, qp: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found = _error(rows, attempt, qn, qp)
    improved = (found < error) & (attempt > 0)
    return torch.where(improved, attempt, best), torch.where(improved, found, error)


def learned_start(rows: Tensor, qn: int, qp: int) -> Tensor:
    """2 * mean|w| / sqrt(Qp), where LSQ begins its training (arXiv 1902.08153, section 2.1)."""
    return 2 * rows.abs().mean(1) / math.sqrt(qp)


WEIGHT_SCALES.add("min-max", min_max, "the largest weight of the row")
WEIGHT_SCALES.add("mse", mse, "least squared error of the row", "1911.07190")
WEIGHT_SCALES.add("lsq", learned_start, "the start that LSQ trains from", "1902.08153")
