"""Training-time augmentation of whole batches: crop, shift, flip, colour jitter, greyscale.

All randomness of an epoch is one table of uniform numbers, a row per sample, drawn from (seed, epoch): the same
sample gets the same change whatever the batches, the workers or the step a run was resumed at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from flatcompress.data import colours, policies
from flatcompress.data.geometry import Boxes, boxes
from flatcompress.data.named import Named
from flatcompress.errors import UserError, unknown
from flatcompress.randomness import generator

_COLUMNS = 12
_MOST = {"mixup": 10, "cutmix": 10, "rand": 14, "magnitude": policies.TOP}  # of a setting; 1 for the others


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
    """Apply `Settings` to images [B, C, H, W]: uint8 in 0..255 or float in 0..1, which come out as float in 0..1."""

    def __init__(self, settings: Settings, seed: int, named: Named | None = None) -> None:
        self.settings, self.seed, self.named = settings, seed, named
        self.moving = True  # may policies move pixels? Not where masks or boxes would stay behind
        self._drawn: dict[str, tuple[tuple[int, int], Tensor]] = {}

    def __repr__(self) -> str:
        return f"Augment({asdict(self.settings)})"

    def __call__(self, images: Tensor, indices: Tensor, total: int, epoch: int) -> Tensor:
        """Augment the samples ``indices`` of a set of ``total`` for ``epoch``; uint8 images are in 0..255."""
        out, channel = torch.empty(images.shape), torch.ones(images.shape[1], 1, 1)
        self.drawn(indices, total, epoch, images.shape)(images, slice(None), 0 * channel, channel, out)
        return out

    def drawn(self, indices: Tensor, total: int, epoch: int, shape: Sequence[int]) -> Changes:
        """What happens to each of the samples ``indices``, images [..., C, H, W] of ``shape``."""
        draws, s = self._draws(total, epoch)[indices], self.settings
        return Changes(
            self,
            indices,
            epoch,
            self._boxes(draws, shape) if s.crop or s.shift or s.flip else None,
            self._policy(total, epoch)[indices] if s.rand or s.trivial else None,
            colours.maps(draws[:, 5:9], s.jitter, draws[:, 11] < s.grayscale, shape[-3])
            if s.jitter or (s.grayscale and shape[-3] == 3)
            else None,
            self._erasing(total, epoch)[indices] if s.erase else None,
        )

    def theta(self, indices: Tensor, total: int, epoch: int, size: Sequence[int]) -> Tensor | None:
        """[B, 2, 3]: where in its source a point of each image lies, both in -1..1; None where nothing is moved.

        size: the last two are height and width.
        """
        s = self.settings
        moving = s.crop or s.shift or s.flip
        return self._boxes(self._draws(total, epoch)[indices], size).theta() if moving else None

    def _boxes(self, draws: Tensor, size: Sequence[int]) -> Boxes:
        s = self.settings
        return boxes(draws[:, :5], (size[-2], size[-1]), s.crop, s.shift, s.flip)

    def _draws(self, total: int, epoch: int) -> Tensor:
        return self._table("augment", total, epoch, _COLUMNS)

    def _policy(self, total: int, epoch: int) -> Tensor:
        return self._table("policy", total, epoch, 1 + 3 * max(1, self.settings.rand))

    def _erasing(self, total: int, epoch: int) -> Tensor:
        """A table of its own: what the older changes draw stays what it was."""
        return self._table("erase", total, epoch, 5)

    def _table(self, name: str, total: int, epoch: int, columns: int) -> Tensor:
        """Uniform numbers [total, columns] of this epoch, drawn once."""
        kept = self._drawn.get(name)
        if kept is None or kept[0] != (total, epoch):
            table = torch.rand(total, columns, generator=generator(self.seed, name, epoch))
            kept = self._drawn[name] = ((total, epoch), table)
        return kept[1]


@dataclass(frozen=True)
class Changes:
    """What an `Augment` does to each sample of a batch; None: nothing of the kind."""

    augment: Augment
    indices: Tensor
    epoch: int
    boxes: Boxes | None
    policy: Tensor | None
    colours: colours.Maps | None
    erasing: Tensor | None

    def __call__(self, images: Tensor, here: slice, mean: Tensor, std: Tensor, out: Tensor) -> None:
        """The samples ``here`` of the batch, uint8 in 0..255 or float in 0..1, changed and normalised, in ``out``.

        mean, std: [C, 1, 1] of images in 0..1.
        """
        s = self.augment.settings
        if self.augment.named is not None:
            images = self.augment.named(_floats(images), self.indices[here], self.epoch)
        if self.boxes is not None:
            images = self.boxes.cut(images, here)
        if self.policy is not None:
            draws, images = self.policy[here], _floats(images)
            changed = policies.apply(images, draws[:, 1:], s.rand, s.magnitude, self.augment.moving)
            chosen = draws[:, 0] < (1.0 if s.rand else s.trivial)
            images = torch.where(chosen.view(-1, 1, 1, 1), changed, images)
        if self.colours is not None:
            self.colours.apply(images, here, mean, std, out)
        else:
            unit = 255 if images.dtype == torch.uint8 else 1
            out.copy_(images).mul_(1 / (unit * std)).sub_(mean / std)
        if self.erasing is not None:
            out.copy_(_erased(out, self.erasing[here], s.erase))


def _floats(images: Tensor) -> Tensor:
    return images.float().div_(255) if images.dtype == torch.uint8 else images


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
