"""Augmentation policies: RandAugment (arXiv 1909.13719) and TrivialAugment (arXiv 2103.10158), on whole batches.

Both draw from the 14 operations of RandAugment's paper and its ranges; RandAugment applies ``n`` of them at one
magnitude, TrivialAugment a single one at a magnitude drawn for each sample. Images are float [B, C, H, W] in 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TOP = 30  # RandAugment's scale of magnitudes
_LUMA = (0.299, 0.587, 0.114)
Change = Callable[[Tensor, Tensor, Tensor], Tensor]  # images, magnitude [B] in 0..1, sign [B] of -1 or 1


def apply(images: Tensor, draws: Tensor, rand: int, magnitude: float, moving: bool = True) -> Tensor:
    """``rand`` operations at ``magnitude`` of 30, or one at a drawn magnitude where ``rand`` is 0.

    draws: [B, 3 * max(1, rand)] in 0..1: operation, sign, magnitude. moving: whether operations that move pixels are
    among them.
    """
    names = [name for name in CHANGES if moving or name not in MOVING]
    for step in range(max(1, rand)):
        pick, side, level = draws[:, 3 * step : 3 * step + 3].unbind(1)
        which = (pick * len(names)).long().clamp(max=len(names) - 1)
        strength = level if rand == 0 else torch.full_like(level, magnitude / TOP)
        sign = torch.where(side < 0.5, -1.0, 1.0)
        found = images.clone()
        for number, name in enumerate(names):
            here = (which == number).nonzero().flatten()
            if len(here):
                found[here] = CHANGES[name](images[here], strength[here], sign[here])
        images = found
    return images.clamp(0, 1)


def _moved(images: Tensor, theta: Tensor) -> Tensor:
    return F.grid_sample(images, _grid(theta, images.shape), mode="bilinear", padding_mode="zeros", align_corners=False)


def _grid(theta: Tensor, shape: Sequence[int]) -> Tensor:
    """[B, H, W, 2]: `affine_grid` as sums of a row and a column; its product of matrices takes twenty times as long."""
    height, width = shape[2:]
    x = ((torch.arange(width) * 2 + 1) / width - 1).view(1, 1, -1)
    y = ((torch.arange(height) * 2 + 1) / height - 1).view(1, -1, 1)
    grid = torch.empty(len(theta), height, width, 2)
    for axis in (0, 1):
        of_x, of_y, shift = theta[:, axis].view(-1, 3, 1, 1).unbind(1)
        torch.add(of_x * x + shift, of_y * y, out=grid[..., axis])
    return grid


def _theta(b: Tensor, entries: dict[tuple[int, int], Tensor]) -> Tensor:
    theta = torch.eye(2, 3).repeat(len(b), 1, 1)
    for (row, column), value in entries.items():
        theta[:, row, column] = value
    return theta


def _sheared(row: int) -> Change:
    return lambda x, m, s: _moved(x, _theta(m, {(row, 1 - row): 0.3 * m * s}))


def _shifted(row: int) -> Change:
    return lambda x, m, s: _moved(x, _theta(m, {(row, 2): 0.9 * m * s}))  # 0.45 of the side; the grid is 2 wide


def _turned(x: Tensor, m: Tensor, s: Tensor) -> Tensor:
    angle = math.radians(30) * m * s
    ratio = x.shape[2] / x.shape[3]  # a circle stays one where the sides differ
    cos, sin = angle.cos(), angle.sin()
    return _moved(x, _theta(m, {(0, 0): cos, (0, 1): sin * ratio, (1, 0): -sin / ratio, (1, 1): cos}))


def _blended(other: Callable[[Tensor], Tensor]) -> Change:
    """Between ``other`` and the image, or beyond it, by up to 0.9."""

    def change(x: Tensor, m: Tensor, s: Tensor) -> Tensor:
        base = other(x)
        return (base + (x - base) * (1 + 0.9 * m * s).view(-1, 1, 1, 1)).clamp(0, 1)

    return change


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        return x
    return (x * torch.tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True).expand_as(x)


def _soft(x: Tensor) -> Tensor:
    """Pillow's smoothing: the middle counts 5 of 13; the border stays as it is."""
    if min(x.shape[2:]) < 3:
        return x.clone()
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    found = x.clone()
    inner = found[:, :, 1:-1, 1:-1]
    inner.mul_(4).add_(rows[..., :-2]).add_(rows[..., 1:-1]).add_(rows[..., 2:]).div_(13)
    return found


def _posterized(x: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """8 down to 4 bits a colour."""
    levels = (2.0 ** (8 - (4 * m).round())).view(-1, 1, 1, 1)
    return (x * 255 / 256 * levels).floor() * (256 / 255) / levels


def _solarized(x: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """What is brighter than a threshold is inverted; it falls from white to black."""
    return torch.where(x >= (1 - m).view(-1, 1, 1, 1), 1 - x, x)


def _stretched(x: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """Every channel from its darkest to its brightest value: autocontrast."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-6), x)


def _equalized(x: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """Every channel's 256 levels as evenly used as may be: a value becomes the share of pixels not above it."""
    levels = (x * 255).round().long().clamp(0, 255).flatten(2)
    counts = torch.stack([torch.bincount(one, minlength=256) for one in levels.flatten(0, 1)])
    counts = counts.view(*levels.shape[:2], 256)
    below = counts.cumsum(-1)
    least = torch.where(counts > 0, below, levels.shape[-1] + 1).amin(-1, keepdim=True)
    total = levels.shape[-1]
    found = (below - least).clamp(min=0) / (total - least).clamp(min=1)
    flat = least >= total  # one level alone
    return torch.where(flat[..., None], x, found.float().gather(2, levels).view_as(x))


CHANGES: dict[str, Change] = {
    "identity": lambda x, m, s: x,
    "shear_x": _sheared(0),
    "shear_y": _sheared(1),
    "translate_x": _shifted(0),
    "translate_y": _shifted(1),
    "rotate": _turned,
    "brightness": _blended(torch.zeros_like),
    "color": _blended(_grey),
    "contrast": _blended(lambda x: _grey(x).mean((1, 2, 3), keepdim=True).expand_as(x)),
    "sharpness": _blended(_soft),
    "posterize": _posterized,
    "solarize": _solarized,
    "autocontrast": _stretched,
    "equalize": _equalized,
}
MOVING = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
