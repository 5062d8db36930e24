"""Rotated digits: scikit-learn's 1,797 handwritten digits, six rotations as domains, one of them never trained on.

The digits are real (UCI "Optical Recognition of Handwritten Digits", 8x8) and come with scikit-learn. All copies
of a digit are on one side of the split, so that no digit is in both training and test.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flatcompress.data.bundle import Part
from flatcompress.data.images.pixels import MemoryPixels
from flatcompress.data.raw_data import RawData, held_out_name, training_domains
from flatcompress.data.split import split_identities
from flatcompress.errors import UserError
from flatcompress.randomness import generator

ANGLES = (0, 15, 30, 45, 60, 75)
DOMAINS = tuple(map(str, ANGLES))


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Images float [1797, 1, 8, 8] in 0..1 and labels int64 [1797]."""
    rows = torch.from_numpy(np.loadtxt(_table(), delimiter=",", ndmin=2))
    images = rows[:, :64].reshape(-1, 1, 8, 8).float().div(16)
    return images, rows[:, 64].to(torch.int64)


def _table() -> Path:
    """scikit-learn's own file, a digit a line. Found and not imported: that would load scipy, a second and a half."""
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise UserError("the digits come with scikit-learn, which is not installed: pip install scikit-learn.")
    return Path(found.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"


@functools.lru_cache(maxsize=4)
def rotated(size: int) -> Tensor:
    """Every digit under every angle: uint8 [6 * 1797, 1, size, size], angle by angle.

    Up-sampling and rotation are one bicubic sampling of the 8x8 original, so that nothing is blurred twice.
    """
    images = digits()[0]
    turned = []
    for angle in map(math.radians, ANGLES):
        theta = torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
        grid = F.affine_grid(theta.expand(len(images), 2, 3), [len(images), 1, size, size], align_corners=False)
        sampled = F.grid_sample(images, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
        turned.append(sampled.clamp(0, 1).mul(255).round().to(torch.uint8))
    return torch.cat(turned)


def rotated_digits(
    seed: int,
    *,
    size: int = 16,
    held_out: Any = "75",
    domains: Any = None,
    copies: int = 0,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
) -> RawData:
    """Digits at 0, 15 ... 75 degrees; ``held_out`` is the domain kept for the end.

    ``domains``: the source domains (default: all the others). ``copies``: under how many of them each training
    digit is seen (0: all), to make the task smaller or harder.
    """
    if not 8 <= size <= 256:
        raise UserError(f"rotated-digits: size must be between 8 and 256, found {size}")
    unseen = held_out_name(held_out, DOMAINS)
    sources = training_domains("rotated-digits", domains, DOMAINS, unseen)
    if not 0 <= copies <= len(sources):
        raise UserError(f"rotated-digits: copies must be between 0 and {len(sources)} (the domains), found {copies}")
    labels = digits()[1]
    split = split_identities(labels, {"test": test_fraction, "val": val_fraction}, seed)
    pixels = MemoryPixels(rotated(size))

    def part(identities: Tensor, names: list[str]) -> Part:
        ids = torch.tensor([DOMAINS.index(name) for name in names]).repeat_interleave(len(identities))
        who = identities.repeat(len(names))
        return Part(pixels, ids * len(labels) + who, labels[who], ids, who)

    train = part(split["train"], sources)
    return RawData(
        classes=tuple(map(str, range(10))),
        train=_fewer_copies(train, len(sources), copies, seed) if copies else train,
        val=part(split["val"], sources),
        test=part(split["test"], sources),
        held_out=part(split["test"], [unseen]) if unseen else None,
        domains=DOMAINS,
        held_out_domain=unseen,
    )


def _fewer_copies(train: Part, domains: int, copies: int, seed: int) -> Part:
    """Each training digit under ``copies`` randomly chosen domains."""
    count = len(train.rows) // domains
    ranks = torch.rand(domains, count, generator=generator(seed, "copies")).argsort(0).argsort(0)
    return train.take((ranks < copies).flatten())
