"""Test sets that others have published beside a training set: ImageNet-C and its likes, ImageNet-V2, CIFAR-10-C.

They are only measured on. Labels are by class, in the order of the training classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatcompress.data.bundle import Part
from flatcompress.data.images.files import Finder, data_root, drawn
from flatcompress.data.images.layout import class_folders
from flatcompress.data.images.pixels import MemoryPixels
from flatcompress.data.images.reading import Reader
from flatcompress.errors import UserError

SEVERITIES = ("1", "2", "3", "4", "5")
Skipped = tuple[str, ...]


def classes_below(
    finder: Finder, folder: Path, classes: Sequence[str], reader: Reader, limit: int, seed: int
) -> tuple[Part, Skipped]:
    """CLASS/image below ``folder``: class names are among ``classes``, or are their numbers, 0 first (ImageNet-V2).

    ``limit``: images per class at most, drawn by the seed (0: all). UserError for a class that training does not have.
    """
    found = class_folders(folder, finder)
    order = {name: label for label, name in enumerate(classes)}
    if found and all(c.name.isdecimal() for c in found) and not any(c.name in order for c in found):
        order = {str(label): label for label in range(len(classes))}
    strange = [c.name for c in found if c.name not in order]
    if strange or not found:
        what = f"{len(strange)} folders are no training class: {', '.join(strange[:5])}" if found else "no class folder"
        raise UserError(
            f"{folder}: {what}. Expected CLASS/image with the training classes, {', '.join(classes[:3])} ..."
        )
    paths: list[Path] = []
    labels: list[int] = []
    for each in found:
        files = drawn([file for one in each.folders for file in finder.images(one)], limit, seed, each.name)
        paths += files
        labels += [order[each.name]] * len(files)
    if not paths:
        raise UserError(f"{folder}: no image in any of its class folders.")
    pixels, good, reasons = reader.read(paths)
    rows = torch.arange(len(good))
    part = Part(pixels, rows, torch.tensor([labels[i] for i in good]), torch.zeros_like(rows), rows)
    return part, tuple(reasons)


def corrupted_folders(
    path: Any, classes: Sequence[str], reader: Reader, limit: int, seed: int
) -> tuple[dict[str, Part], Skipped]:
    """KIND/SEVERITY/CLASS/image, as ImageNet-C (arXiv 1903.12261) is laid out; keys are "kind/severity".

    ``limit``: images per class, kind and severity. UserError names the folder that does not fit.
    """
    root = data_root(path, "corrupted_path")
    finder = Finder(root)
    found: dict[str, Part] = {}
    skipped: list[str] = []
    for kind in finder.subfolders(root):
        severities = finder.subfolders(kind)
        wrong = [p.name for p in severities if p.name not in SEVERITIES]
        if wrong or not severities:
            raise UserError(
                f"{kind}: expected folders 1 to 5 (KIND/SEVERITY/CLASS/image), found {', '.join(wrong[:5]) or 'none'}."
            )
        for severity in severities:
            part, bad = classes_below(finder, severity, classes, reader, limit, seed)
            found[f"{kind.name}/{severity.name}"] = part
            skipped += bad
    if not found:
        raise UserError(f"{root}: no corruption in it; expected KIND/SEVERITY/CLASS/image.")
    return found, tuple(skipped)


def cifar_c(path: Any, limit: int) -> dict[str, Part]:
    """KIND.npy, uint8 [5 x N, 32, 32, 3] by severity, and labels.npy, as CIFAR-10-C is laid out (arXiv 1903.12261).

    ``limit``: images per kind and severity at most (0: all). UserError for anything else in the files; pickled arrays
    are refused.
    """
    root = data_root(path, "corrupted_path")
    files = sorted(p for p in root.glob("*.npy") if p.name != "labels.npy")
    if not files or not (root / "labels.npy").is_file():
        raise UserError(f"{root}: expected KIND.npy files and labels.npy, as CIFAR-10-C has them.")
    labels = _array(root / "labels.npy")
    count, rest = divmod(len(labels), len(SEVERITIES))
    if labels.ndim != 1 or rest or not count or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{root / 'labels.npy'}: expected 5 x N whole numbers, found {labels.dtype} {labels.shape}.")
    if labels.min() < 0 or labels.max() > 9:
        raise UserError(f"{root / 'labels.npy'}: CIFAR-10 has labels 0 to 9, found up to {labels.max()}.")
    targets = torch.from_numpy(labels.astype(np.int64))
    found: dict[str, Part] = {}
    for file in files:
        pixels = _array(file)
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 32, 32, 3):
            raise UserError(
                f"{file}: expected uint8 ({len(labels)}, 32, 32, 3), as labels.npy says, found {pixels.dtype} "
                f"{pixels.shape}."
            )
        for number, severity in enumerate(SEVERITIES):
            rows = slice(number * count, number * count + (min(limit, count) if limit else count))
            found[f"{file.stem}/{severity}"] = _part(pixels[rows], targets[rows])
    return found


def _part(pixels: np.ndarray[Any, Any], labels: Tensor) -> Part:
    kept = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    rows = torch.arange(len(labels))
    return Part(MemoryPixels(kept), rows, labels, torch.zeros_like(rows), rows)


def _array(file: Path) -> np.ndarray[Any, Any]:
    """Mapped, not read: a header that lies about the size fails, and nothing in the file can run."""
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: not a plain array file ({error}).") from None
