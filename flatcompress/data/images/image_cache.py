"""Computed images kept on disk: written whole or not at all, checked when read, computed again when damaged."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_DIGEST = hashlib.sha256().digest_size


def folder() -> Path:
    """The user's cache folder: ``FLATCOMPRESS_CACHE``, else the platform's own place."""
    if own := os.environ.get("FLATCOMPRESS_CACHE"):
        return Path(own)
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "flatcompress"


def cached(name: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Tensor:
    """The uint8 tensor ``make()`` of ``shape``, from the file ``name`` where that is there and whole.

    A cache that cannot be read or written costs time and a warning, never the run.
    """
    try:
        path = folder() / name
        if (images := _read(path, shape)) is not None:
            return images
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        warnings.warn(f"image cache not used, the images are drawn each time: {error}", stacklevel=2)
        return make()
    images = make()
    try:
        _write(path, images)
    except OSError as error:
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
    """Through a temporary file beside it: another process sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = images.contiguous().numpy()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(body.data).digest())
            file.write(body.data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
