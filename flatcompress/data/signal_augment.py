"""Training-time augmentation of series [C, T], spectrograms [1, frames, bands] and features [F].

As for images, all randomness depends on the seed, the epoch and the sample's index, so a resumed run sees the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from flatcompress.errors import UserError, unknown
from flatcompress.randomness import generator

_COLUMNS = 8


@dataclass(frozen=True)
class SignalSettings:
    """What to do; zero switches a change off."""

    shift: float = 0.0  # largest shift in time, as a share of it; what comes in is zero
    noise: float = 0.0  # standard deviation of white noise (normalised inputs have 1)
    gain: float = 0.0  # largest relative change of loudness
    time_mask: float = 0.0  # largest share of the time that is zero (SpecAugment, arXiv 1904.08779)
    band_mask: float = 0.0  # largest share of neighbouring bands or channels that is zero (SpecAugment)
    mixup: float = 0.0  # alpha of mixup (arXiv 1710.09412)
    cutmix: float = 0.0  # alpha of cutmix (arXiv 1905.04899)


def parse(option: Any, seed: int, shape: Sequence[int], name: str) -> SignalAugment | None:
    """A `SignalAugment` for samples of ``shape``, from a mapping of settings. UserError on anything else."""
    if option in (None, False, "none"):
        return None
    known = [f.name for f in fields(SignalSettings)]
    if not isinstance(option, dict):
        raise UserError(
            f"data set {name!r}: augment is settings ({', '.join(known)}), found {option!r}; presets are for images: "
            "without settings inputs stay as they are."
        )
    for key, value in option.items():
        if key not in known:
            raise unknown("augment setting", key, known)
        most = 10 if key in ("mixup", "cutmix") else 1
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            raise UserError(f"augment setting {key!r} must be between 0 and {most}, found {value!r}")
        if len(shape) == 1 and value and key in ("shift", "time_mask", "cutmix"):
            raise UserError(f"augment setting {key!r}: features {tuple(shape)} have no time; leave it out.")
    return SignalAugment(SignalSettings(**option), seed)


class SignalAugment:
    """Apply `SignalSettings` to normalised float inputs [B, ...]."""

    def __init__(self, settings: SignalSettings, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self._drawn: tuple[tuple[int, int], Tensor] | None = None

    def __repr__(self) -> str:
        return f"SignalAugment({asdict(self.settings)})"

    def __call__(self, x: Tensor, indices: Tensor, total: int, epoch: int) -> Tensor:
        """Augment the samples ``indices`` of a set of ``total`` for ``epoch``."""
        if self._drawn is None or self._drawn[0] != (total, epoch):
            table = torch.rand(total, _COLUMNS, generator=generator(self.seed, "signals", epoch))
            self._drawn = ((total, epoch), table)
        draws, s = self._drawn[1][indices], self.settings
        time, bands = (2, 3) if x.ndim == 4 else (x.ndim - 1, 1)
        if s.shift:
            x = _shifted(x, ((2 * draws[:, 0] - 1) * s.shift * x.shape[time]).round().long(), time)
        if s.gain:
            x = x * (1 + s.gain * (2 * draws[:, 1] - 1)).view(-1, *[1] * (x.ndim - 1))
        if s.noise:
            drawn = [
                torch.randn(x.shape[1:], generator=generator(self.seed, "noise", epoch, i)) for i in indices.tolist()
            ]
            x = x + s.noise * torch.stack(drawn)
        if s.time_mask:
            x = _masked(x, draws[:, 2], draws[:, 3], s.time_mask, time)
        if s.band_mask:
            x = _masked(x, draws[:, 4], draws[:, 5], s.band_mask, bands)
        return x


def _shifted(x: Tensor, by: Tensor, axis: int) -> Tensor:
    """Each sample later by ``by`` steps along ``axis``, zeros behind it."""
    steps = torch.arange(x.shape[axis])
    source = steps - by.view(-1, 1)
    shape = [len(x), *[1] * (x.ndim - 1)]
    shape[axis] = x.shape[axis]
    inside = ((source >= 0) & (source < x.shape[axis])).view(shape)
    index = source.clamp(0, x.shape[axis] - 1).view(shape).expand_as(x)
    return torch.where(inside, x.gather(axis, index), torch.zeros(()))


def _masked(x: Tensor, how_long: Tensor, where: Tensor, most: float, axis: int) -> Tensor:
    """Zeros over a stretch of ``axis`` of each sample, of up to a share ``most``."""
    size = x.shape[axis]
    length = (how_long * (most * size + 1)).floor().clamp(max=round(most * size))
    start = (where * (size - length + 1)).floor()
    at = torch.arange(size)
    inside = (at >= start.view(-1, 1)) & (at < (start + length).view(-1, 1))
    shape = [len(x), *[1] * (x.ndim - 1)]
    shape[axis] = size
    return torch.where(inside.view(shape), torch.zeros(()), x)
