"""Synthesised signals: heartbeats with three kinds of beat, and the spectra of a machine that is well or damaged.

Stand-ins for one-dimensional classification and for anomaly detection, made where they are used, with held-out domains
(a slower heart with another lead, another machine) and the corruptions of `corruptions.series`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flatcompress.data.bundle import DataBundle
from flatcompress.data.corruptions.series import corrupted
from flatcompress.data.embedded.drawing import checked
from flatcompress.data.in_memory import bundle
from flatcompress.randomness import generator

BEATS = ("normal", "early", "wide")
LENGTH = 128  # samples of a window of heartbeats
RATE, BANDS = 8000, 64  # of the machine's sound: samples a second, bands of its spectrum


def drawn_heartbeats(
    seed: int, *, train_count: int = 1200, val_count: int = 200, test_count: int = 400, task: Any = None
) -> DataBundle:
    """Windows [2, 128] of two leads; the class is that of the middle beat: normal, early, or wide."""
    counts = checked("drawn-heartbeats", train_count, val_count, test_count)
    parts = {name: _beats(generator(seed, "beats", name), count, name == "held_out") for name, count in counts.items()}
    changed = corrupted(*parts["test"], seed)
    return bundle({"name": "drawn-heartbeats", "classes": BEATS, **parts, "corrupted": changed}, task)


def _beats(rng: torch.Generator, count: int, slow: bool) -> tuple[Tensor, Tensor]:
    kind = torch.arange(count) % len(BEATS)
    t = torch.arange(LENGTH).float().view(1, -1)
    period = (58 if slow else 44) + 6 * torch.rand(count, 1, generator=rng)
    middle = 64 + 6 * (torch.rand(count, 1, generator=rng) - 0.5)
    early = torch.where(kind.view(-1, 1) == 1, 0.32 * period, torch.zeros(count, 1))
    wide = 1 + 1.6 * (kind.view(-1, 1) == 2)
    waves = [_beat(t, middle - early, wide)]
    waves += [
        _beat(t, middle + side * period + (0 if side < 0 else 0.2 * early), torch.ones(count, 1)) for side in (-1, 1)
    ]
    first = torch.stack(waves).sum(0)
    drift = 0.1 * torch.sin(2 * math.pi * (t / LENGTH + torch.rand(count, 1, generator=rng)))
    second = (0.3 if slow else 0.6) * first.roll(2, 1)
    both = torch.stack([first + drift, second + drift], 1)
    return both + 0.06 * torch.randn(both.shape, generator=rng), kind


def _beat(t: Tensor, at: Tensor, wide: Tensor) -> Tensor:
    """A small P wave, the QRS complex, a T wave."""

    def bump(offset: float, width: Tensor | float, height: float) -> Tensor:
        return height * torch.exp(-((t - at - offset) ** 2) / (2 * width**2))

    complex_ = bump(0, 1.6 * wide, 1.0) - bump(-4, 1.5 * wide, 0.25) - bump(4, 1.8 * wide, 0.3)
    return complex_ + bump(-12, 3.0, 0.15) + bump(15, 5.0, 0.3)


def drawn_machines(
    seed: int, *, train_count: int = 1200, val_count: int = 200, test_count: int = 400, task: Any = None
) -> DataBundle:
    """Log spectra [64] of a machine's hum; half of the test part is damaged: a knock, a whine, or a lost harmonic."""
    counts = checked("drawn-machines", train_count, val_count, test_count)
    parts = {
        name: _hums(
            generator(seed, "machines", name), count, damaged=name in ("test", "held_out"), other=name == "held_out"
        )
        for name, count in counts.items()
    }
    mean, std = parts["train"][0].mean(0), parts["train"][0].std(0).clamp(min=1e-3)
    scaled = {name: ((x - mean) / std, y) for name, (x, y) in parts.items()}
    changed = corrupted(*scaled["test"], seed)
    chosen = "reconstruction" if task is None else task
    return bundle({"name": "drawn-machines", **scaled, "corrupted": changed}, chosen)


def _hums(rng: torch.Generator, count: int, damaged: bool, other: bool) -> tuple[Tensor, Tensor]:
    """Half a second of sound each, as the logarithm of the energy in bands of equal ratio."""
    t = torch.arange(RATE // 2).float().view(1, -1) / RATE
    base = (121 if other else 118) + 4 * torch.rand(count, 1, generator=rng)
    bad = torch.arange(count) % 2 if damaged else torch.zeros(count, dtype=torch.int64)
    fault = bad * (1 + torch.arange(count) // 2 % 3)
    sound = torch.zeros(count, t.shape[1])
    for k in range(1, 13):
        loud = (1 / k) * (0.8 + 0.4 * torch.rand(count, 1, generator=rng))
        loud = torch.where((fault.view(-1, 1) == 3) & (k in (3, 4, 5)), 0.1 * loud, loud)
        sound += loud * torch.sin(2 * math.pi * (k * base * t + torch.rand(count, 1, generator=rng)))
    noise = 0.05 * torch.randn(sound.shape, generator=rng)
    knock = torch.exp(-((t * 18) % 1) * 12) * torch.randn(sound.shape, generator=rng)
    whine = torch.sin(2 * math.pi * (2300 + 200 * torch.rand(count, 1, generator=rng)) * t)
    sound = sound + noise + 0.35 * knock * (fault.view(-1, 1) == 1) + 0.15 * whine * (fault.view(-1, 1) == 2)
    energy = torch.fft.rfft(sound * torch.hann_window(sound.shape[1])).abs() ** 2
    edges = torch.logspace(math.log10(60), math.log10(RATE / 2), BANDS + 1)
    band = torch.bucketize(torch.linspace(0, RATE / 2, energy.shape[1]), edges) - 1
    inside = (band >= 0) & (band < BANDS)
    sums = torch.zeros(count, BANDS).index_add_(1, band[inside], energy[:, inside])
    return (sums + 1.0).log(), bad
