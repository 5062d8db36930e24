"""The plain optimizer under a flat method, and learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch


def make_base_optimizer(
    groups: list[dict[str, Any]], name: str, lr: float, weight_decay: float, momentum: float, nesterov: bool, betas: Any
) -> torch.optim.Optimizer:
    """The plain optimizer under a flat method. ``groups`` are torch parameter groups."""
    if name == "sgd":
        return torch.optim.SGD(
            groups, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov and momentum > 0
        )
    cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return cls(groups, lr=lr, weight_decay=weight_decay, betas=tuple(betas))


def lr_factor(schedule: str, step: int, total: int) -> float:
    """Learning-rate factor at ``step`` of ``total``.

    ``one_cycle`` warms up linearly over the first 30 % from 1/25 and then falls by a cosine to 1/10,000;
    ``cosine`` falls to 0, ``linear`` likewise in a straight line.
    """
    t = step / max(total, 1)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return max(0.0, 1.0 - t)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(t, 1.0)))
    if t < 0.3:
        return 0.04 + 0.96 * t / 0.3
    return 1e-4 + (1 - 1e-4) * 0.5 * (1 + math.cos(math.pi * min((t - 0.3) / 0.7, 1.0)))
