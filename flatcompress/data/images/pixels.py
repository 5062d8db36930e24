"""Where an `ImageSet` gets its pixels: memory, or chunks that are computed when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, int, int]  # channels, height, width


class Pixels(Protocol):
    """A sequence of images of one shape, in 0..255: uint8, or float32 where a file held more than eight bits."""

    @property
    def shape(self) -> Shape: ...

    def __len__(self) -> int: ...

    def gather(self, rows: Tensor) -> Tensor:
        """[B, C, H, W] for row numbers [B]."""
        ...


class MemoryPixels:
    """All images in one tensor [N, C, H, W], uint8 or float32 in 0..255."""

    def __init__(self, images: Tensor) -> None:
        if images.dtype not in (torch.uint8, torch.float32) or images.dim() != 4:
            raise ValueError(
                f"images must be uint8 or float32 [N, C, H, W], found {images.dtype} {tuple(images.shape)}"
            )
        self.images = images

    @property
    def shape(self) -> Shape:
        return tuple(self.images.shape[1:])  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, rows: Tensor) -> Tensor:
        return self.images.index_select(0, rows)  # copies whole images; indexing goes number by number


def eight_bits(images: Tensor) -> Tensor:
    """Images in 0..255 as uint8, rounded where they were finer: corruptions and pictures are made of eight bits."""
    return images if images.dtype == torch.uint8 else images.round().to(torch.uint8)


class ChunkedPixels:
    """Images computed from other images, a fixed chunk at a time.

    ``change(images, chunk_number)`` sees the same images under the same chunk number whatever order samples are
    asked in, so that a random change does not depend on the batches. The last ``keep`` chunks stay in memory.
    """

    CHUNK = 64

    def __init__(self, source: Pixels, rows: Tensor, change: Callable[[Tensor, int], Tensor], keep: int = 64) -> None:
        self.source, self.rows, self.change, self.keep = source, rows, change, keep
        self._chunks: dict[int, Tensor] = {}

    @property
    def shape(self) -> Shape:
        return self.source.shape

    def __len__(self) -> int:
        return len(self.rows)

    def _chunk(self, number: int) -> Tensor:
        if number not in self._chunks:
            rows = self.rows[number * self.CHUNK : (number + 1) * self.CHUNK]
            while len(self._chunks) >= self.keep:
                del self._chunks[next(iter(self._chunks))]
            self._chunks[number] = self.change(eight_bits(self.source.gather(rows)), number)
        return self._chunks[number]

    def gather(self, rows: Tensor) -> Tensor:
        out = torch.empty((len(rows), *self.shape), dtype=torch.uint8)
        numbers = rows // self.CHUNK
        for number in numbers.unique().tolist():
            here = numbers == number
            out[here] = self._chunk(number)[rows[here] - number * self.CHUNK]
        return out
