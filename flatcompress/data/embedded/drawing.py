"""What the drawn data sets share: their counts, their parts and the domain that is not seen, and how they are drawn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flatcompress.data.bundle import Part
from flatcompress.data.images.pixels import MemoryPixels
from flatcompress.data.raw_data import RawData
from flatcompress.errors import UserError
from flatcompress.randomness import generator

# (count, random numbers, unseen domain?) -> uint8 images [N, 3, H, W], labels [N] or None, targets [N, ...] or None
Draw = Callable[[int, torch.Generator, bool], tuple[Tensor, Tensor | None, Tensor | None]]


def pictures(
    seed: int,
    name: str,
    counts: tuple[int, int, int],
    domains: tuple[str, str],
    classes: tuple[str, ...],
    draw: Draw,
    task: str = "classification",
) -> RawData:
    """Train, val and test in the first of ``domains``, and as many as test in the second, which is held out.

    counts: images of train, val and test. UserError where one is out of bounds.
    """
    sizes = dict(zip(("train", "val", "test", domains[1]), (*counts, counts[2])))
    for part, count in sizes.items():
        if not 8 <= count <= 1_000_000:
            raise UserError(f"{name}: {part}_count must be between 8 and 1,000,000, found {count}")

    def drawn(part: str) -> Part:
        count, unseen = sizes[part], part == domains[1]
        images, labels, targets = draw(count, generator(seed, name.removeprefix("drawn-"), part), unseen)
        labels = torch.zeros(count, dtype=torch.int64) if labels is None else labels
        where = torch.full((count,), int(unseen))
        return Part(MemoryPixels(images), torch.arange(count), labels, where, torch.arange(count), targets)

    train, val, test, held_out = map(drawn, sizes)
    return RawData(classes, train, val, test, held_out, domains, domains[1], task=task)


def checked(name: str, train: int, val: int, test: int) -> dict[str, int]:
    """Samples of train, val, test and held_out, which has as many as test. UserError where one is out of bounds."""
    counts = {"train": train, "val": val, "test": test, "held_out": test}
    for part, count in counts.items():
        if not 12 <= count <= 100_000:
            raise UserError(f"{name}: counts must be between 12 and 100,000, found {count} ({part})")
    return counts


def plane(size: int) -> tuple[Tensor, Tensor]:
    """y [1, size, 1] and x [1, 1, size] of the pixels' centres, in 0..1."""
    axis = (torch.arange(size) + 0.5) / size
    return axis.view(1, -1, 1), axis.view(1, 1, -1)


def texture(n: int, cells: int, size: int, rng: torch.Generator) -> Tensor:
    """[N, 3, size, size] in 0..1: as many random colours a side as ``cells``, one running into the next."""
    coarse = torch.rand(n, 3, cells, cells, generator=rng)
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)


def inked(picture: Tensor, noise: float, rng: torch.Generator) -> Tensor:
    """uint8 of a picture in 0..1, with normal noise of that deviation."""
    picture = picture + noise * torch.randn(picture.shape, generator=rng)
    return picture.clamp(0, 1).mul(255).round().to(torch.uint8)
