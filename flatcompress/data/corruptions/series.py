"""Corruptions of series [N, C, T] and features [N, F]: what goes wrong between a sensor and a network.

Strengths are shares of the standard deviation of each channel over the whole part. Severities 1, 3 and 5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flatcompress.randomness import generator

Change = Callable[[Tensor, Tensor, int, torch.Generator], Tensor]
SEVERITIES = (1, 3, 5)


def noise(x: Tensor, spread: Tensor, severity: int, rng: torch.Generator) -> Tensor:
    """White noise."""
    return x + 0.12 * severity * spread * torch.randn(x.shape, generator=rng)


def gain(x: Tensor, spread: Tensor, severity: int, rng: torch.Generator) -> Tensor:
    """Every sample louder or softer by up to a tenth a severity."""
    factor = 1 + 0.1 * severity * (2 * torch.rand(len(x), generator=rng) - 1)
    return x * factor.view(-1, *[1] * (x.ndim - 1))


def drift(x: Tensor, spread: Tensor, severity: int, rng: torch.Generator) -> Tensor:
    """A ramp over the window; a constant of features."""
    slope = 0.3 * severity * (2 * torch.rand(len(x), generator=rng) - 1)
    ramp = torch.linspace(-1, 1, x.shape[-1]) if x.ndim > 2 else torch.ones(x.shape[-1])
    return x + spread * slope.view(-1, *[1] * (x.ndim - 1)) * ramp


def clipping(x: Tensor, spread: Tensor, severity: int, rng: torch.Generator) -> Tensor:
    """Nothing above or below a limit that falls with the severity."""
    limit = (3.5 - 0.5 * severity) * spread
    return torch.minimum(torch.maximum(x, -limit), limit)


def missing(x: Tensor, spread: Tensor, severity: int, rng: torch.Generator) -> Tensor:
    """A stretch of the window, or of the features, is zero."""
    length = max(1, round(0.06 * severity * x.shape[-1]))
    start = torch.randint(0, x.shape[-1] - length + 1, (len(x),), generator=rng)
    at = torch.arange(x.shape[-1]) - start.view(-1, *[1] * (x.ndim - 1))
    return torch.where((at >= 0) & (at < length), torch.zeros(()), x)


CHANGES: dict[str, Change] = {
    "noise": noise, "gain": gain, "drift": drift, "clipping": clipping, "missing": missing,
}  # fmt: skip


def corrupted(x: Tensor, y: Tensor, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Every change of ``x`` [N, ..., T] at every severity, with its targets, by "kind/severity"."""
    spread = x.std(dim=(0, x.ndim - 1), keepdim=True).clamp(min=1e-6) if x.ndim > 2 else x.std().clamp(min=1e-6)
    return {
        f"{kind}/{severity}": (change(x, spread, severity, generator(seed, kind, severity)), y)
        for kind, change in CHANGES.items()
        for severity in SEVERITIES
    }
