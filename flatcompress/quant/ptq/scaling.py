"""What is moved between layers before anything is quantized: equalized weights, or smoothed activations.

A scaling gets a float network's traced graph and its calibration batches (and the bits of weights and activations,
where its facts say so), changes weights in place so that the network computes what it did, and returns a row per pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from flatcompress.quant.ptq.flatquant import flatten
from flatcompress.quant.ptq.pairs import Pair, find_pairs, watch
from flatcompress.registry import Registry


@dataclass(frozen=True)
class ScalingFacts:
    """``needs_bits``: it is made for grids, and takes (weight bits, activation bits or None) as its third argument."""

    needs_bits: bool = False


SCALINGS = Registry("scaling", ScalingFacts)
_ROUNDS = 20
_CONVERGED = 1e-3
_LARGEST = 1e3
_MARGIN = 1.1
Rows = list[dict[str, Any]]


def none(gm: fx.GraphModule, batches: Sequence[Tensor]) -> Rows:
    """Nothing is moved."""
    return []


@torch.no_grad()
def equalize(gm: fx.GraphModule, batches: Sequence[Tensor]) -> Rows:
    """Cross-layer equalization: s_c = sqrt(r1_c r2_c) / r2_c, over all pairs until nothing moves (1906.04721, eq. 11).

    r1: the producer's range per output channel (BatchNorm folded in), r2: the readers' per input channel. A channel
    without weights on either side stays. Pairs with a ReLU6 between them are left alone: its ceiling would move.
    """
    pairs, refused = find_pairs(gm)
    usable = [p for p in pairs if p.producer is not None and p.ceiling is None]
    total = {p.name: torch.ones(p.channels()) for p in usable}
    for _ in range(_ROUNDS):
        largest = 0.0
        for pair in usable:
            r1, r2 = pair.producer_range(), pair.reader_range()
            factors = _positive((r1 * r2).sqrt() / r2)
            pair.move(factors)
            total[pair.name] *= factors.cpu()
            largest = max(largest, float((factors - 1).abs().max()))
        if largest < _CONVERGED:
            break
    refused |= {p.name: "ReLU6 behind it" for p in pairs if p.ceiling is not None}
    return _rows("equalize", usable, total, refused)


@torch.no_grad()
def smooth(gm: fx.GraphModule, batches: Sequence[Tensor], alpha: float = 0.5) -> Rows:
    """SmoothQuant behind every LayerNorm: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) (arXiv 2211.10438, eq. 4)."""
    pairs, refused = find_pairs(gm)
    return _smoothed(gm, [p for p in pairs if p.producer is None], refused, batches, alpha)


@torch.no_grad()
def smooth_all(gm: fx.GraphModule, batches: Sequence[Tensor], alpha: float = 0.5) -> Rows:
    """As `smooth`, behind convolutions too. Under a ReLU6 a channel is only stretched, as far as it was seen to reach.

    There the network computes what it did on the calibration data (with a margin of a tenth), not on every input.
    """
    pairs, refused = find_pairs(gm)
    return _smoothed(gm, pairs, refused, batches, alpha)


def _smoothed(
    gm: fx.GraphModule, pairs: list[Pair], refused: dict[str, str], batches: Sequence[Tensor], alpha: float
) -> Rows:
    seen = _largest_inputs(gm, pairs, batches)
    total = {}
    for pair in pairs:
        reach = seen[pair.name].clamp_min(0)
        factors = _positive(reach**alpha / pair.reader_range() ** (1 - alpha))
        if pair.ceiling is not None:
            factors = torch.maximum(factors / factors.max(), reach * _MARGIN / pair.ceiling).clamp_max(1.0)
            factors = torch.where(reach > 0, factors, torch.ones_like(factors))
        pair.move(factors)
        total[pair.name] = factors.cpu()
    return _rows("smooth", pairs, total, refused)


def _positive(factors: Tensor) -> Tensor:
    """Factors as they are where they are usable, one elsewhere (a channel without weights or without values)."""
    usable = torch.isfinite(factors) & (factors > 0)
    return torch.where(usable, factors, torch.ones_like(factors)).clamp(1 / _LARGEST, _LARGEST)


def _largest_inputs(gm: fx.GraphModule, pairs: list[Pair], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """max|x| per channel of what each pair's readers read, [C], on the calibration batches."""
    wanted: dict[fx.Node, list[str]] = {}
    for pair in pairs:
        wanted.setdefault(pair.tensor, []).append(pair.name)
    by_last = {p.name for p in pairs if p.producer is None or isinstance(p.producer, nn.Linear)}
    found: dict[str, Tensor] = {}

    def see(node: fx.Node, value: Tensor) -> None:
        for name in wanted[node]:
            largest = value.movedim(-1 if name in by_last else 1, 0).flatten(1).abs().amax(1)
            found[name] = torch.maximum(found[name], largest) if name in found else largest

    watch(gm, wanted, batches, see)
    return found


def _rows(kind: str, pairs: list[Pair], total: dict[str, Tensor], refused: dict[str, str]) -> Rows:
    rows: Rows = [
        {
            "step": kind,
            "layer": pair.name,
            "readers": list(pair.readers),
            "smallest": float(total[pair.name].min()),
            "largest": float(total[pair.name].max()),
        }
        for pair in pairs
    ]
    return rows + [{"step": kind, "layer": name, "skipped": why} for name, why in refused.items()]


SCALINGS.add("none", none, "nothing is moved")
SCALINGS.add("equalize", equalize, "cross-layer equalization of weight ranges", "1906.04721")
SCALINGS.add("smooth", smooth, "SmoothQuant's factors behind LayerNorms", "2211.10438")
SCALINGS.add("smooth-all", smooth_all, "SmoothQuant's factors behind LayerNorms and convolutions", "2211.10438")
SCALINGS.add(
    "flatquant", flatten, "FlatQuant's learned transformations that fold into weights", "2410.09426", needs_bits=True
)
