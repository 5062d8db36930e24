"""Weights that jump to and fro across a rounding edge (arXiv 2203.11086): seen, dampened, frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.quant.layers import quantized_layers
from flatcompress.quant.quantizers.modules import QuantizedLayer
from flatcompress.quant.quantizers.protocol import LearnedStep, learns_step


@dataclass
class _Track:
    """One layer: last integers, last direction of change, frequency f, mean integer, what is frozen."""

    integers: Tensor
    direction: Tensor
    frequency: Tensor
    mean: Tensor
    frozen: Tensor


class OscillationTracker:
    """Call `step` after every optimizer step (not inside a perturbed pass: that would fake oscillations).

    An integer weight oscillates when it changes opposite to its last change; f <- m * o + (1 - m) * f (eq. 4). With a
    ``threshold``, a weight whose f exceeds it is frozen at round(mean of its past integers) for good (section 4.2);
    ``threshold`` may be set anew at any time (`anneal`). ``max_bits``: only layers with at most that many are watched.
    """

    def __init__(
        self, model: nn.Module, momentum: float = 0.01, threshold: float | None = None, max_bits: int = 4
    ) -> None:
        if not 0 < momentum < 1:
            raise UserError(f"momentum must lie in (0, 1); found {momentum!r}.")
        self.momentum, self.threshold = momentum, threshold
        self.layers = {n: layer for n, layer in quantized_layers(model).items() if _bits(layer) <= max_bits}
        self._tracks: dict[str, _Track] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Look at the integers; freeze and hold when there is a threshold."""
        for name, layer in self.layers.items():
            quantizer = layer.weight_quant.tensor_quant
            now = quantizer.integers(layer.weight)
            track = self._tracks.get(name)
            if track is None:
                zero = torch.zeros_like(now)
                self._tracks[name] = _Track(now, zero, zero.clone(), now.clone(), zero.bool())
                continue
            self._update(track, now)
            if self.threshold is not None:
                self._freeze(track, layer, quantizer, self.threshold)

    def _update(self, track: _Track, now: Tensor) -> None:
        change = (now - track.integers).sign()
        oscillates = (change * track.direction < 0).to(now)
        track.frequency.mul_(1 - self.momentum).add_(oscillates, alpha=self.momentum)
        track.mean.mul_(1 - self.momentum).add_(now, alpha=self.momentum)
        track.direction = torch.where(change == 0, track.direction, change)
        track.integers = now

    def _freeze(self, track: _Track, layer: QuantizedLayer, quantizer: LearnedStep, threshold: float) -> None:
        new = (track.frequency > threshold) & ~track.frozen
        track.mean = torch.where(new, track.mean.round(), track.mean)
        track.frozen |= new
        held = torch.where(track.frozen, track.mean.round(), track.integers)
        track.integers = held
        layer.weight.copy_(torch.where(track.frozen, held * quantizer.step(), layer.weight))

    def share(self, threshold: float = 0.005) -> dict[str, float]:
        """By layer, the share of weights with f above ``threshold``."""
        return {n: float((t.frequency > threshold).double().mean()) for n, t in self._tracks.items()}

    def frozen_share(self) -> dict[str, float]:
        """By layer, the share of frozen weights."""
        return {n: float(t.frozen.double().mean()) for n, t in self._tracks.items()}

    def state_dict(self) -> dict[str, Any]:
        """Every track."""
        return {n: {k: v.clone() for k, v in vars(t).items()} for n, t in self._tracks.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`. UserError for layers that are not watched here."""
        if strange := set(state) - set(self.layers):
            raise UserError(f"this oscillation state has layers that are not watched here: {sorted(strange)}.")
        self._tracks = {n: _Track(**{k: v.clone() for k, v in t.items()}) for n, t in state.items()}


def dampening_loss(model: nn.Module, max_bits: int = 4) -> Tensor:
    """sum of (sg[Q(w)] - clip(w, range))^2 over the quantized weights (eq. 5): multiply by lambda, add to the loss.

    Weights of more than ``max_bits`` bits are left out. The gradient is 2 (w - Q(w)) inside the range, 0 at grid points
    and outside.
    """
    total = torch.zeros(())
    for layer in quantized_layers(model).values():
        quantizer = layer.weight_quant.tensor_quant
        if _bits(layer) <= max_bits:
            step = quantizer.step()
            with torch.no_grad():
                target = quantizer.integers(layer.weight) * step
            inside = torch.minimum(torch.maximum(layer.weight, -quantizer.qn * step), quantizer.qp * step)
            total = total.to(target) + (target - inside).square().sum()
    return total


def anneal(start: float, end: float, progress: float) -> float:
    """Cosine from ``start`` to ``end`` as ``progress`` goes from 0 to 1 (the paper's schedule of threshold and lambda).

    >>> anneal(0.1, 0.01, 0.0), anneal(0.1, 0.01, 1.0)
    (0.1, 0.01)
    """
    if progress >= 1:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * max(progress, 0.0)))


def _bits(layer: QuantizedLayer) -> int:
    quantizer = layer.weight_quant.tensor_quant
    if not learns_step(quantizer):
        raise UserError("oscillations are tracked for lsq, lsq+ and pact weights, not for stock Brevitas quantizers.")
    return quantizer.bits
