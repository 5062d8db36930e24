"""Mixup and cutmix: two samples of a batch in one, and the loss of both targets."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flatcompress.randomness import derive


@dataclass(frozen=True)
class Mixed:
    """Inputs that are ``share`` themselves and for the rest those at ``partner``, int64 [B]."""

    x: Tensor
    partner: Tensor
    share: float


@dataclass(frozen=True)
class Mixing:
    """mixup (arXiv 1710.09412) and cutmix (arXiv 1905.04899) by their alpha, 0: off; with both a coin decides.

    What is drawn depends on the seed, the step and the part of its batch: every pass of a flat method sees the same
    inputs, and so does a resumed run.
    """

    mixup: float
    cutmix: float
    seed: int

    def __call__(self, x: Tensor, step: int, part: int) -> Mixed:
        """``x`` [B, ...] with another order of itself mixed in."""
        rng = np.random.default_rng(derive(self.seed, "mix", step, part))
        partner = torch.from_numpy(rng.permutation(len(x))).to(x.device)
        cut = self.cutmix > 0 and (self.mixup <= 0 or rng.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        share = float(rng.beta(alpha, alpha))
        if not cut:
            return Mixed(share * x + (1 - share) * x[partner], partner, share)
        inside = _box(x.shape[2:], share, rng).to(x.device)
        return Mixed(torch.where(inside, x[partner], x), partner, 1 - float(inside.double().mean()))


def _box(shape: torch.Size, share: float, rng: np.random.Generator) -> Tensor:
    """bool [H, W] or [T]: a box of about 1 - ``share`` of it, cut off at the border."""
    inside = torch.ones(shape, dtype=torch.bool)
    for axis, size in enumerate(shape):
        half = size * (1 - share) ** (1 / len(shape)) / 2
        middle = rng.random() * size
        low, high = math.ceil(max(0.0, middle - half)), math.floor(min(float(size), middle + half))
        at = torch.arange(size).view(-1, *[1] * (len(shape) - 1 - axis))
        inside &= (at >= low) & (at < high)
    return inside
