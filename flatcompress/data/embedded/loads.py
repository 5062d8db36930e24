"""Synthesised loads of a small network of four sites, hour by hour, for forecasting."""

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

SITES, SEEN, AHEAD = 4, 96, 24  # channels, hours of a window, hours to be forecast
_DELAYS = (0, 2, 5, 9)  # hours after which the weather reaches a site


def drawn_loads(
    seed: int, *, train_count: int = 1200, val_count: int = 200, test_count: int = 400, task: Any = None
) -> DataBundle:
    """Windows [4, 96] of hourly loads and the next 24 hours of each, [96]; a regression.

    A load is a day's and a week's course and the weather, which comes to one site after the other. The parts follow
    one another in time; the held-out part is another network, of other habits.
    """
    counts = checked("drawn-loads", train_count, val_count, test_count)
    course = _series(generator(seed, "loads"), sum(n + SEEN + AHEAD for n in list(counts.values())[:3]), False)
    other = _series(generator(seed, "loads", "held_out"), counts["held_out"] + SEEN + AHEAD, True)
    parts, start = {}, 0
    for name, count in counts.items():
        whole, first = (other, 0) if name == "held_out" else (course, start)
        parts[name] = _windows(whole[:, first : first + count + SEEN + AHEAD], count)
        start = first + count + SEEN + AHEAD
    changed = corrupted(*parts["test"], seed)
    return bundle({"name": "drawn-loads", **parts, "corrupted": changed}, "regression" if task is None else task)


def _series(rng: torch.Generator, hours: int, other: bool) -> Tensor:
    """[4, hours], each of about mean 0 and deviation 1."""
    t = torch.arange(hours).float()
    late = 6 * torch.rand(SITES, 1, generator=rng) + (4 if other else 0)
    day = torch.sin(2 * math.pi * (t - late) / 24) + 0.4 * torch.sin(4 * math.pi * (t - late) / 24 + 1)
    week = 0.5 * torch.cos(2 * math.pi * t / 168 + torch.rand(SITES, 1, generator=rng))
    kicks = torch.randn(hours + max(_DELAYS), generator=rng)
    weather = torch.empty_like(kicks)
    now = 0.0
    for hour, kick in enumerate(kicks.tolist()):
        now = 0.95 * now + 0.31 * kick
        weather[hour] = now
    reached = torch.stack([weather[max(_DELAYS) - d : max(_DELAYS) - d + hours] for d in _DELAYS])
    return 0.7 * day + week + (0.9 if other else 0.7) * reached + 0.15 * torch.randn(SITES, hours, generator=rng)


def _windows(course: Tensor, count: int) -> tuple[Tensor, Tensor]:
    every = course.unfold(1, SEEN + AHEAD, 1)[:, :count].transpose(0, 1)
    return every[..., :SEEN].contiguous(), every[..., SEEN:].reshape(count, -1)
