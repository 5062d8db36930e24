"""Computed images kept on disk: written whole or not at all, checked when read, computed again when damaged."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flatcompress.errors import RunError, UserError
from flatcompress.storage import cache_folder, write_bytes_atomic

_DIGEST = hashlib.sha256().digest_size


def cached(name: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Tensor:
    """The uint8 tensor ``make()`` of ``shape``, from the file ``name`` where that is there and whole.

    A cache that cannot be read or written costs time and a warning, never the run.
    """
    try:
        path = cache_folder() / name
        if (images := _read(path, shape)) is not None:
            return images
    except (OSError, UserError) as error:
        warnings.warn(f"image cache not used, the images are drawn each time: {error}", stacklevel=2)
        return make()
    images = make()
    try:
        _write(path, images)
    except (OSError, RunError) as error:
        warnings.warn(f"image cache {path} not written, the images are drawn each time: {error}", stacklevel=2)
    return images


def _read(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """None where there is no file, or another than what was written."""
    try:
        content = bytearray(path.read_bytes())
    except FileNotFoundError:
        return None
    body = memoryview(content)[_DIGEST:]
    expected = torch.Size(shape).numel()
    if len(body) != expected or hashlib.sha256(body).digest() != bytes(content[:_DIGEST]):
        warnings.warn(f"image cache {path} is damaged; its images are drawn again", stacklevel=3)
        return None
    return torch.frombuffer(content, dtype=torch.uint8, offset=_DIGEST).view(shape)


def _write(path: Path, images: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    body = images.contiguous().numpy().data
    write_bytes_atomic(path, b"".join((hashlib.sha256(body).digest(), body)))
