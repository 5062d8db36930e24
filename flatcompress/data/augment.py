"""Training-time augmentation of whole batches: crop, shift, flip, colour jitter, greyscale.

All randomness of an epoch is one table of uniform numbers, a row per sample, drawn from (seed, epoch): the same
sample gets the same change whatever the batches, the workers or the step a run was resumed at.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flatcompress.data import policies
from flatcompress.data.named import Named
from flatcompress.errors import UserError, unknown
from flatcompress.randomness import generator

_COLUMNS = 12
_MOST = {"mixup": 10, "cutmix": 10, "rand": 14, "magnitude": policies.TOP}  # of a setting; 1 for the others
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Settings:
    """What to do; zero switches a change off."""

    crop: float = 0.0  # smallest share of the area that a random resized crop keeps, e.g. 0.7
    shift: float = 0.0  # largest shift, as a share of the side, e.g. 0.125
    flip: float = 0.0  # probability of a horizontal flip
    jitter: float = 0.0  # strength of brightness, contrast, saturation and hue jitter
    grayscale: float = 0.0  # probability of losing all colour
    erase: float = 0.0  # probability of losing a rectangle (random erasing, arXiv 1708.04896)
    mixup: float = 0.0  # alpha of mixup (arXiv 1710.09412)
    cutmix: float = 0.0  # alpha of cutmix (arXiv 1905.04899)
    trivial: float = 0.0  # probability of TrivialAugment's one operation (arXiv 2103.10158)
    rand: int = 0  # operations of RandAugment (arXiv 1909.13719)
    magnitude: float = 9.0  # of RandAugment, 0 to 30


PRESETS = {
    "none": None,
    "standard": Settings(shift=0.125, flip=0.5),  # the CIFAR habit: pad by an eighth and crop, flip
    "trivial": Settings(flip=0.5, trivial=1.0),
    "rand": Settings(flip=0.5, rand=2),
    "domainbed": Settings(crop=0.7, flip=0.5, jitter=0.3, grayscale=0.1),  # arXiv 2007.01434
}


def parse(option: Any, seed: int) -> Augment | None:
    """An `Augment` from a preset's name, a mapping of settings, or None. UserError on anything else."""
    if option is None or option is False:
        return None
    if isinstance(option, str):
        if ":" in option:
            return Augment(Settings(), seed, Named(option, {}, seed))
        if option not in PRESETS:
            raise unknown("augment preset", option, PRESETS)
        settings = PRESETS[option]
        return Augment(settings, seed) if settings else None
    if not isinstance(option, dict):
        raise UserError(f"data option 'augment' must be a preset's name or settings, found {option!r}")
    option, named = _named(option, seed)
    for key, value in option.items():
        _check_setting(key, value)
    settings = Settings(**option)
    if settings.rand and settings.trivial:
        raise UserError("augment: rand and trivial are two policies; take one of them")
    return Augment(settings, seed, named)


def _check_setting(key: str, value: Any) -> None:
    """UserError for a setting that there is not, and for a value out of its range."""
    known = [f.name for f in fields(Settings)]
    if key not in known:
        raise unknown("augment setting", key, [*known, "transform"])
    if key == "rand" and type(value) is not int:
        raise UserError(f"augment setting 'rand' is how many operations an image goes through, found {value!r}")
    most = _MOST.get(key, 1)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise UserError(f"augment setting {key!r} must be between 0 and {most}, found {value!r}")


def _named(option: dict[str, Any], seed: int) -> tuple[dict[str, Any], Named | None]:
    """The settings without the keys of somebody else's transform, and that transform."""
    rest = {key: value for key, value in option.items() if key not in ("transform", "options")}
    options = option.get("options", {})
    if "transform" not in option:
        if "options" in option:
            raise UserError("augment: options are those of a transform; name it with 'transform'")
        return rest, None
    if not isinstance(option["transform"], str) or not isinstance(options, dict):
        raise UserError("augment: transform is package.module:factory, and options a mapping of its keys")
    return rest, Named(option["transform"], options, seed)


class Augment:
    """Apply `Settings` to float images [B, C, H, W] in 0..1."""

    def __init__(self, settings: Settings, seed: int, named: Named | None = None) -> None:
        self.settings, self.seed, self.named = settings, seed, named
        self.moving = True  # may policies move pixels? Not where masks or boxes would stay behind
        self._drawn: tuple[tuple[int, int], Tensor] | None = None
        self._holes: tuple[tuple[int, int], Tensor] | None = None

    def __repr__(self) -> str:
        return f"Augment({asdict(self.settings)})"

    def __call__(self, images: Tensor, indices: Tensor, total: int, epoch: int) -> Tensor:
        """Augment the samples ``indices`` of a set of ``total`` for ``epoch``."""
        draws, s = self._draws(total, epoch)[indices], self.settings
        if self.named is not None:
            images = self.named(images, indices, epoch)
        if s.crop or s.shift or s.flip:
            images = _geometry(images, _theta(draws, s), s)
        if s.rand or s.trivial:
            images = self._by_policy(images, indices, total, epoch)
        if s.jitter:
            images = _jitter(images, draws, s.jitter)
        if s.grayscale and images.shape[1] == 3:
            images = torch.where((draws[:, 11] < s.grayscale).view(-1, 1, 1, 1), _luma(images), images)
        return _erased(images, self._erasing(total, epoch)[indices], s.erase) if s.erase else images

    def _by_policy(self, images: Tensor, indices: Tensor, total: int, epoch: int) -> Tensor:
        s = self.settings
        columns = 1 + 3 * max(1, s.rand)
        draws = torch.rand(total, columns, generator=generator(self.seed, "policy", epoch))[indices]
        changed = policies.apply(images, draws[:, 1:], s.rand, s.magnitude, self.moving)
        chosen = draws[:, 0] < (1.0 if s.rand else s.trivial)
        return torch.where(chosen.view(-1, 1, 1, 1), changed, images)

    def theta(self, indices: Tensor, total: int, epoch: int) -> Tensor | None:
        """[B, 2, 3]: where in its source a point of each image lies, both in -1..1; None where nothing is moved."""
        s = self.settings
        return _theta(self._draws(total, epoch)[indices], s) if s.crop or s.shift or s.flip else None

    def _draws(self, total: int, epoch: int) -> Tensor:
        if self._drawn is None or self._drawn[0] != (total, epoch):
            table = torch.rand(total, _COLUMNS, generator=generator(self.seed, "augment", epoch))
            self._drawn = ((total, epoch), table)
        return self._drawn[1]

    def _erasing(self, total: int, epoch: int) -> Tensor:
        """A table of its own: what the older changes draw stays what it was."""
        if self._holes is None or self._holes[0] != (total, epoch):
            self._holes = ((total, epoch), torch.rand(total, 5, generator=generator(self.seed, "erase", epoch)))
        return self._holes[1]


def _erased(images: Tensor, draws: Tensor, probability: float) -> Tensor:
    """A rectangle of 2 to 33 % of the area, sides up to 1 : 3.3, gets the image's mean colour."""
    height, width = images.shape[2:]
    area = (0.02 + 0.31 * draws[:, 1]) * (draws[:, 0] < probability)
    aspect = torch.exp((2 * draws[:, 2] - 1) * math.log(3.3))
    tall, wide = (area * aspect).sqrt().clamp(max=1) * height, (area / aspect).sqrt().clamp(max=1) * width
    top, left = draws[:, 3] * (height - tall), draws[:, 4] * (width - wide)
    y, x = torch.arange(height).view(1, -1, 1) + 0.5, torch.arange(width).view(1, 1, -1) + 0.5
    down = (y > top.view(-1, 1, 1)) & (y < (top + tall).view(-1, 1, 1))
    across = (x > left.view(-1, 1, 1)) & (x < (left + wide).view(-1, 1, 1))
    return torch.where((down & across)[:, None], images.mean((2, 3), keepdim=True), images)


def _theta(draws: Tensor, s: Settings) -> Tensor:
    """Crop, shift and flip as one affine map of each image."""
    area = 1 - draws[:, 0] * (1 - s.crop) if s.crop else torch.ones(len(draws))
    aspect = torch.exp((2 * draws[:, 1] - 1) * math.log(4 / 3) / 2) if s.crop else torch.ones(len(draws))
    width, height = (area.sqrt() * aspect).clamp(max=1), (area.sqrt() / aspect).clamp(max=1)
    across = (2 * draws[:, 2] - 1) * (1 - width + 2 * s.shift)
    down = (2 * draws[:, 3] - 1) * (1 - height + 2 * s.shift)
    mirror = torch.where(draws[:, 4] < s.flip, -1.0, 1.0)
    theta = torch.zeros(len(draws), 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = width * mirror, across
    theta[:, 1, 1], theta[:, 1, 2] = height, down
    return theta


def _geometry(images: Tensor, theta: Tensor, s: Settings) -> Tensor:
    """Each image sampled at ``theta``."""
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    padding = "zeros" if s.shift else "border"
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def _luma(images: Tensor) -> Tensor:
    weights = torch.tensor(_LUMA).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True).expand_as(images)


def _jitter(images: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Brightness, contrast, saturation and hue factors in 1 +- strength, as DomainBed's colour jitter."""
    factor = (1 + strength * (2 * draws[:, 5:8] - 1)).unsqueeze(-1).unsqueeze(-1)
    images = images * factor[:, 0:1]
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + (images - mean) * factor[:, 1:2]
    if images.shape[1] == 3:
        grey = _luma(images)
        images = grey + (images - grey) * factor[:, 2:3]
        images = _turn_hue(images, (2 * draws[:, 8] - 1) * strength)
    return images.clamp(0, 1)


def _turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate colours about the grey axis by ``turns`` of a full circle (the YIQ approximation of a hue shift)."""
    cos, sin = torch.cos(2 * math.pi * turns), torch.sin(2 * math.pi * turns)
    third, root = (1 - cos) / 3, sin / math.sqrt(3)
    rows = [
        torch.stack([cos + third, third - root, third + root], 1),
        torch.stack([third + root, cos + third, third - root], 1),
        torch.stack([third - root, third + root, cos + third], 1),
    ]
    return torch.einsum("bij,bjhw->bihw", torch.stack(rows, 1), images)
