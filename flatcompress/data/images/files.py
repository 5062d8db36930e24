"""Finding classes and image files below a folder, in a fixed order, without leaving it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from flatcompress.data.images.decoding import SUFFIXES
from flatcompress.errors import UserError
from flatcompress.randomness import generator

MOST_FILES = 20_000_000


def data_root(path: object, name: str) -> Path:
    """The folder that ``path`` names. UserError when it is missing, not given, or no folder."""
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise UserError(f"data set {name!r}: give the folder with 'path', found {path!r}.")
    root = Path(path).expanduser()
    try:
        if root.is_dir():
            os.scandir(root).close()
            return root
    except OSError as error:
        raise UserError(f"{root}: cannot be read ({error.strerror or error}).") from None
    what = "is a file, not a folder" if root.exists() else "does not exist"
    raise UserError(f"data set {name!r}: {root} {what}. Give the data folder with 'path'.")


def subfolders(folder: Path, root: Path) -> list[Path]:
    """The visible folders in ``folder``, sorted. UserError for a link that leads out of ``root`` or in a ring."""
    found = []
    for entry in _entries(folder):
        if entry.name.startswith((".", "__")):
            continue
        path = Path(entry.path)
        if entry.is_symlink():
            inside(path, root)
        if path.is_dir():
            found.append(path)
    return found


def images(folder: Path, root: Path) -> list[Path]:
    """Every image file below ``folder``, sorted; linked folders are not entered, so there are no rings."""
    found: list[Path] = []
    for entry in _entries(folder):
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            found += images(path, root)
        elif path.suffix.lower() in SUFFIXES:
            if entry.is_symlink():
                inside(path, root)
            found.append(path)
    if len(found) > MOST_FILES:
        raise UserError(f"{folder}: more than {MOST_FILES:,} images.")
    return found


def drawn(files: list[Path], limit: int, seed: int, name: str) -> list[Path]:
    """At most ``limit`` of the files of class ``name``, drawn by the seed, in their order (0: all of them)."""
    if not limit or len(files) <= limit:
        return files
    chosen = torch.randperm(len(files), generator=generator(seed, "limit", name))[:limit]
    return [files[i] for i in chosen.sort().values.tolist()]


def inside(path: Path, root: Path) -> None:
    """UserError unless what ``path`` links to lies below ``root``."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise UserError(f"{path}: a link that leads nowhere, or in a ring. Remove it.") from None
    if not target.is_relative_to(root.resolve()):
        raise UserError(
            f"{path}: a link to {target}, outside of the data folder. Copy the files in, or point 'path' there."
        )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error}).") from None
