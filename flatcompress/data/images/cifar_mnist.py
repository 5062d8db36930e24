"""CIFAR-10 and MNIST from the files their authors publish, read as plain bytes: nothing in them can run."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flatcompress.data.bundle import Part
from flatcompress.data.images.files import data_root
from flatcompress.data.images.pixels import MemoryPixels
from flatcompress.data.images.published_tests import cifar_c
from flatcompress.data.raw_data import RawData
from flatcompress.data.split import split_identities
from flatcompress.errors import UserError

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_RECORD = 1 + 3 * 32 * 32
_MOST = 1 << 30
_IMAGES, _LABELS = 0x803, 0x801


def cifar10(
    seed: int, *, path: Any = None, val_fraction: float = 0.1, limit: int = 0, corrupted_path: Any = None
) -> RawData:
    """The binary version: data_batch_1.bin ... data_batch_5.bin and test_batch.bin, 10,000 records each.

    ``limit``: training, test and corrupted images at most (0: all). ``corrupted_path``: CIFAR-10-C's folder, in place
    of computed corruptions. UserError for the pickled Python version: unpickling could run whatever is in the file.
    """
    root = data_root(path, "cifar10")
    if not (root / "test_batch.bin").exists() and (root / "cifar-10-batches-bin").is_dir():
        root = root / "cifar-10-batches-bin"
    batches = sorted(root.glob("data_batch_*.bin"))
    if not batches or not (root / "test_batch.bin").exists():
        pickled = (root / "data_batch_1").exists() or (root / "cifar-10-batches-py").is_dir()
        hint = " The Python version there holds pickles, which are not read." if pickled else ""
        raise UserError(
            f"{root}: data_batch_1.bin ... and test_batch.bin are not there.{hint} Use the CIFAR-10 binary version."
        )
    train = [_cifar_file(file) for file in batches]
    images, labels = torch.cat([x for x, _ in train]), torch.cat([y for _, y in train])
    raw = _raw(CIFAR_CLASSES, (images, labels), _cifar_file(root / "test_batch.bin"), val_fraction, limit, seed)
    return raw if corrupted_path is None else replace(raw, corrupted=cifar_c(corrupted_path, limit))


def mnist(seed: int, *, path: Any = None, size: int = 28, val_fraction: float = 0.1, limit: int = 0) -> RawData:
    """train-images-idx3-ubyte and its three companions (also .gz): MNIST, Fashion-MNIST, KMNIST.

    ``size``: side to resize to. ``limit``: training and test images at most (0: all).
    """
    if not 4 <= size <= 256:
        raise UserError(f"mnist: size must be between 4 and 256, found {size}")
    root = data_root(path, "mnist")
    parts = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = _idx(_either(root, f"{prefix}-images-idx3-ubyte", f"{prefix}-images.idx3-ubyte"), _IMAGES)
        labels = _idx(_either(root, f"{prefix}-labels-idx1-ubyte", f"{prefix}-labels.idx1-ubyte"), _LABELS)
        if len(images) != len(labels):
            raise UserError(f"{root}: {len(images)} {part} images but {len(labels)} labels.")
        parts[part] = (_resized(images.unsqueeze(1), size), labels.to(torch.int64))
    classes = tuple(map(str, range(int(max(parts["train"][1].max(), parts["test"][1].max())) + 1)))
    return _raw(classes, parts["train"], parts["test"], val_fraction, limit, seed)


def _raw(
    classes: tuple[str, ...],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    val_fraction: float,
    limit: int,
    seed: int,
) -> RawData:
    if isinstance(limit, bool) or limit < 0:
        raise UserError(f"data option 'limit' must be 0 or more, found {limit!r}")
    (images, labels), held = train, test
    if limit:
        images, labels, held = images[:limit], labels[:limit], (test[0][:limit], test[1][:limit])
    split = split_identities(labels, {"val": val_fraction}, seed)

    def part(pixels: MemoryPixels, targets: Tensor, rows: Tensor) -> Part:
        return Part(pixels, rows, targets[rows], torch.zeros_like(rows), rows)

    pixels = MemoryPixels(images)
    return RawData(
        classes,
        part(pixels, labels, split["train"]),
        part(pixels, labels, split["val"]),
        part(MemoryPixels(held[0]), held[1], torch.arange(len(held[1]))),
    )


def _bytes(file: Path) -> bytes:
    try:
        if file.stat().st_size > _MOST:
            raise UserError(f"{file}: larger than any file of this data set.")
        if file.suffix == ".gz":
            with gzip.open(file) as stream:
                data = stream.read(_MOST + 1)
        else:
            data = file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    if len(data) > _MOST:
        raise UserError(f"{file}: unpacks to more than any file of this data set.")
    return data


def _cifar_file(file: Path) -> tuple[Tensor, Tensor]:
    data = _bytes(file)
    if not data or len(data) % _RECORD:
        raise UserError(f"{file}: {len(data)} bytes, not a whole number of {_RECORD}-byte records (cut off?).")
    records = torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(-1, _RECORD)
    labels = records[:, 0].to(torch.int64)
    if int(labels.max()) >= len(CIFAR_CLASSES):
        raise UserError(f"{file}: label {int(labels.max())} found; CIFAR-10 has labels 0 to 9.")
    return records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), labels


def _either(root: Path, *names: str) -> Path:
    for name in names:
        for candidate in (root / name, root / f"{name}.gz", root / "raw" / name, root / "raw" / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    raise UserError(
        f"{root}: {names[0]} (or {names[0]}.gz) is not there. Give the folder of the idx files with 'path'."
    )


def _idx(file: Path, magic: int) -> Tensor:
    data = _bytes(file)
    axes = magic & 0xFF
    head = 4 + 4 * axes
    if len(data) < head or int.from_bytes(data[:4], "big") != magic:
        raise UserError(f"{file}: not an idx file of {'images' if axes == 3 else 'labels'} (wrong first bytes).")
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
    count = int(np.prod(shape, dtype=object))
    if count == 0 or len(data) != head + count:
        raise UserError(f"{file}: its header promises {count:,} bytes, {len(data) - head:,} are there (cut off?).")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=head).copy()).view(shape)


def _resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size and images.shape[-2] == size:
        return images
    scaled = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return scaled.round().clamp(0, 255).to(torch.uint8)
