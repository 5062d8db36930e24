"""Radius policies: give one as ``rho`` to any method; it is asked at every step."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from flatcompress.errors import UserError
from flatcompress.flat.engine.context import Step

Policy = Callable[[Step], float | Tensor]


def tied_to_lr(rho_max: float, rho_min: float, lr_max: float, lr_min: float = 0.0) -> Policy:
    """GSAM's schedule: (rho - rho_min) / (rho_max - rho_min) equals the same share of the first group's lr range."""
    if not 0 <= rho_min <= rho_max or not 0 <= lr_min < lr_max:
        raise UserError(
            f"tied_to_lr needs 0 <= rho_min <= rho_max and 0 <= lr_min < lr_max; found rho {rho_min}..{rho_max}, "
            f"lr {lr_min}..{lr_max}"
        )

    def rho(step: Step) -> float:
        lr = float(step.base.param_groups[0]["lr"])
        return rho_min + (rho_max - rho_min) * (lr - lr_min) / (lr_max - lr_min)

    return rho


def cosine(rho_start: float, rho_end: float, total_steps: int) -> Policy:
    """From ``rho_start`` to ``rho_end`` along a half cosine over ``total_steps``."""
    if total_steps < 1 or min(rho_start, rho_end) < 0:
        raise UserError("cosine needs total_steps >= 1 and radii >= 0")

    def rho(step: Step) -> float:
        done = min(1.0, step.t / total_steps)
        return rho_end + (rho_start - rho_end) / 2 * (1 + math.cos(math.pi * done))

    return rho


def warmup(rho: float, steps: int) -> Policy:
    """Linear from 0 to ``rho`` over the first ``steps`` steps."""
    if steps < 1 or rho < 0:
        raise UserError("warmup needs steps >= 1 and rho >= 0")
    return lambda step: rho * min(1.0, step.t / steps)
