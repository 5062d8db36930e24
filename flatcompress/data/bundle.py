"""What every data set becomes: normalised image sets for training, selection, test, the unseen domain, corruptions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flatcompress.data.augment import Augment, Changes
from flatcompress.data.images.pixels import ChunkedPixels, Pixels, eight_bits
from flatcompress.tasks import Task, build

if TYPE_CHECKING:
    from collections.abc import Mapping

Batch = tuple[Tensor, Tensor]
_IN_CACHE = 1 << 17  # numbers that are worked on at once, so that they stay in the processor's cache


def collate(batch: Batch) -> Batch:
    """The identity: `ImageSet.__getitems__` already returns a batch. Pass as a DataLoader's ``collate_fn``."""
    return batch


@dataclass(frozen=True)
class Part:
    """Raw samples: rows of ``pixels`` with their labels, domains and source images; each tensor is int64 [N].

    ``targets`` [N, ...]: what is learned, where that is not the label; labels then only keep proportions in splits.
    """

    pixels: Pixels
    rows: Tensor
    labels: Tensor
    domain_ids: Tensor
    identities: Tensor
    targets: Tensor | None = None

    def take(self, chosen: Tensor) -> Part:
        """The samples at positions (or under a mask) ``chosen``."""
        return Part(
            self.pixels,
            self.rows[chosen],
            self.labels[chosen],
            self.domain_ids[chosen],
            self.identities[chosen],
            None if self.targets is None else self.targets[chosen],
        )


class ImageSet(Dataset[Batch]):
    """Normalised float32 images [C, H, W] with their targets; whole batches through ``__getitems__``.

    ``targets`` are what the ``task`` learns, the labels in classification. ``labels``, ``domain_ids`` (position in the
    bundle's domains) and ``identities`` (the source image) are int64 [N].
    With augmentation, what a sample looks like depends on the seed, the epoch (`set_epoch`) and its index alone.
    """

    def __init__(
        self,
        part: Part,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: Augment | None = None,
        task: Task | None = None,
    ) -> None:
        channels = part.pixels.shape[0]
        self.part, self.augment = part, augment
        self.labels, self.domain_ids, self.identities = part.labels, part.domain_ids, part.identities
        self.targets = part.labels if part.targets is None else part.targets
        self._task = build(task)
        self._mean = torch.tensor(mean or [0.0] * channels).view(-1, 1, 1)
        self._std = torch.tensor(std or [1.0] * channels).view(-1, 1, 1)
        # In shared memory: persistent loader workers must see the epoch change.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    persistent = True  # only the epoch changes, in shared memory: loading processes may stay

    @property
    def on_disk(self) -> bool:
        """Are the images decoded as they are asked for?"""
        return bool(getattr(self.part.pixels, "on_disk", False))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, targets = self.__getitems__([range(len(self))[index]])
        return images[0], targets[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        where = torch.as_tensor(indices, dtype=torch.int64)
        rows, shape, targets = self.part.rows[where], (len(where), *self.part.pixels.shape), self.targets[where]
        images, changes = torch.empty(shape), None
        if self.augment is not None:
            changes = self.augment.drawn(where, len(self), int(self._epoch), shape)
        step = max(1, _IN_CACHE // math.prod(shape[1:]))
        for i in range(0, len(rows), step):
            raw = self.part.pixels.gather(rows[i : i + step])
            self._finish(raw, images[i : i + step], changes, slice(i, i + step))
        if self.augment is not None and self._task.moved is not None:
            theta = self.augment.theta(where, len(self), int(self._epoch), shape)
            targets = targets if theta is None else self._task.moved(targets, theta)
        return images, self._task.target(images, targets)

    def _finish(self, raw: Tensor, out: Tensor, changes: Changes | None, here: slice) -> None:
        """Stored images augmented and normalised, in ``out``."""
        if changes is None:
            out.copy_(raw).div_(255).sub_(self._mean).div_(self._std)
            return
        changes(raw if raw.dtype == torch.uint8 else raw.div(255), here, self._mean, self._std, out)

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W]: the stored images, neither augmented nor normalised, in eight bits."""
        return eight_bits(self.part.pixels.gather(self.part.rows[torch.as_tensor(indices, dtype=torch.int64)]))

    def narrowed(self, indices: Tensor) -> ImageSet:
        """The samples at ``indices`` alone, without augmentation; of computed images no others are computed."""
        part = self.part.take(indices)
        if isinstance(part.pixels, ChunkedPixels):
            pixels = ChunkedPixels(part.pixels.source, part.pixels.rows[part.rows], part.pixels.change)
            part = replace(part, pixels=pixels, rows=torch.arange(len(indices)))
        return ImageSet(part, self._mean.flatten().tolist(), self._std.flatten().tolist(), task=self._task)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that augmentation draws for; without augmentation nothing changes."""
        self._epoch.fill_(epoch)


@dataclass(frozen=True)
class DataBundle:
    """A loaded data set. ``mean`` and ``std`` are per channel and apply to pixels in 0..1.

    ``train``, ``val`` and ``test`` come from the source domains and share no source image; ``val`` is for model
    selection alone. ``held_out`` is the unseen domain, ``held_out_seen`` what it has of identities
    that other domains have shown in training. ``corrupted`` maps "kind/severity" to a corrupted part of
    ``test``. ``skipped`` says which files were left out, and why, where the recipe allowed that. ``notes``: what else
    the user should know of the data. ``intensity``: what became 0 and 1 of images with more than eight bits.
    ``task``: what is learned. ``classes``: what its outputs stand for: classes, labels, columns of numbers.
    ``features``: how sound became inputs.
    """

    name: str
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: ImageSet
    val: ImageSet
    test: ImageSet
    held_out: ImageSet | None
    corrupted: Mapping[str, ImageSet] = field(default_factory=dict)
    domains: tuple[str, ...] = ()
    held_out_domain: str | None = None
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    intensity: tuple[float, float] | None = None
    task: Task = field(default_factory=build)
    features: Mapping[str, Any] = field(default_factory=dict)
    held_out_seen: ImageSet | None = None

    def counts(self) -> dict[str, int]:
        """How many samples each part has; ``measured``: all that a finished stage may be measured on, corrupted too."""
        parts = {name: getattr(self, name) for name in ("train", "val", "test", "held_out")}
        counts = {name: len(part) for name, part in parts.items() if part is not None}
        corrupted = sum(len(part) for part in self.corrupted.values())
        return {**counts, "measured": counts["test"] + counts.get("held_out", 0) + corrupted}
