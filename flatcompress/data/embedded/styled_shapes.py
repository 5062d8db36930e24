"""Styled shapes: twelve drawn classes in four styles as domains, one of them never trained on.

A procedural counterpart of PACS (arXiv 1710.03077), made where it is used: nothing is downloaded, and there are as
many images of any size as are asked for. An image is determined by the seed, its style, its part, its number and the
size alone, not by how many others are drawn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flatcompress.data.bundle import Part
from flatcompress.data.embedded.shapes import SHAPES
from flatcompress.data.embedded.styles import STYLES, paint
from flatcompress.data.images.image_cache import cached
from flatcompress.data.images.pixels import MemoryPixels
from flatcompress.data.raw_data import RawData, held_out_name, training_domains
from flatcompress.errors import UserError
from flatcompress.randomness import generator

CLASSES = tuple(SHAPES)
DOMAINS = tuple(STYLES)
PARTS = ("train", "val", "test")

# Part of the cached files' names: raise it whenever any pixel changes.
DRAWING = 1
_MOST = 1_000_000


def styled_shapes(
    seed: int,
    *,
    size: int = 24,
    held_out: Any = "sketch",
    domains: Any = None,
    train_count: int = 1500,
    val_count: int = 300,
    test_count: int = 500,
    held_out_count: int = 1000,
    cache: bool = True,
) -> RawData:
    """Shapes as photo, art, cartoon and sketch; ``held_out`` is the style kept for the end.

    ``domains``: the source styles (default: all the others). The counts are images per source style, and
    ``held_out_count`` those of the unseen one; classes take turns. ``cache``: keep the images on disk.
    """
    if not 12 <= size <= 512:
        raise UserError(f"styled-shapes: size must be between 12 and 512, found {size}")
    counts = {"train": train_count, "val": val_count, "test": test_count}
    for name, count in {**counts, "held_out": held_out_count}.items():
        if not len(CLASSES) <= count <= _MOST:
            raise UserError(f"styled-shapes: {name}_count must be between {len(CLASSES)} and {_MOST}, found {count}")
    unseen = held_out_name(held_out, DOMAINS)
    sources = training_domains("styled-shapes", domains, DOMAINS, unseen)

    def part(name: str, styles: list[str], count: int) -> Part:
        return _part(seed, name, styles, count, size, cache)

    return RawData(
        classes=CLASSES,
        train=part("train", sources, train_count),
        val=part("val", sources, val_count),
        test=part("test", sources, test_count),
        held_out=part("test", [unseen], held_out_count) if unseen else None,
        domains=DOMAINS,
        held_out_domain=unseen,
    )


def draw_block(seed: int, style: str, part: str, number: int, size: int) -> Tensor:
    """The images uint8 [N, 3, size, size] of one block; N is `block_length`, the classes take turns."""
    labels = torch.arange(block_length(size)) % len(CLASSES)
    return paint(style, labels, size, generator(seed, "styled-shapes", style, part, number))


def block_length(size: int) -> int:
    """Images drawn at once: a multiple of the classes, few enough for the memory that large images need."""
    return len(CLASSES) * max(1, min(20, 40_000 // size**2))


def _part(seed: int, name: str, styles: list[str], count: int, size: int, cache: bool) -> Part:
    images = torch.cat([_images(seed, style, name, count, size, cache) for style in styles])
    ids = torch.tensor([DOMAINS.index(style) for style in styles]).repeat_interleave(count)
    position = torch.arange(count).repeat(len(styles))
    identities = (ids * len(PARTS) + PARTS.index(name)) * _MOST + position
    return Part(MemoryPixels(images), torch.arange(len(images)), position % len(CLASSES), ids, identities)


def _images(seed: int, style: str, part: str, count: int, size: int, cache: bool) -> Tensor:
    """The first ``count`` images of a style's part, whole blocks drawn and the rest cut off."""

    def make() -> Tensor:
        blocks = range(-(-count // block_length(size)))
        return torch.cat([draw_block(seed, style, part, number, size) for number in blocks])[:count]

    if not cache:
        return make()
    name = f"styled-shapes-{DRAWING}/{size}px-seed{seed}-{style}-{part}-{count}.images"
    return cached(name, (count, 3, size, size), make)
