"""Finding classes and image files below a folder, in a fixed order, without leaving it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import torch

from flatcompress.data.images.decoding import readable
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


class Finder:
    """Walks the folders below ``root`` and keeps account of what it leaves out.

    ``notes``: sentences for the user about what is there and not used.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.notes: list[str] = []
        self._left_out: Counter[str] = Counter()
        self._first: Path | None = None
        self._seen: set[Path] = set()

    def note(self, text: str) -> None:
        """Say ``text`` once."""
        if text not in self.notes:
            self.notes.append(text)

    def subfolders(self, folder: Path) -> list[Path]:
        """The visible folders in ``folder``, sorted. UserError for a link that leads out of the root or in a ring."""
        found = []
        for entry in _entries(folder):
            if entry.name.startswith((".", "__")):
                continue
            path = Path(entry.path)
            if entry.is_symlink():
                inside(path, self.root)
            if path.is_dir():
                found.append(path)
        return found

    def holds_folders(self, folder: Path) -> bool:
        """Are there folders in ``folder``, and no image beside them?"""
        return bool(self.subfolders(folder)) and not self.holds_images(folder)

    def holds_images(self, folder: Path) -> bool:
        """Is an image file in ``folder`` itself?"""
        return any(readable(Path(entry.name)) and not entry.is_dir() for entry in _entries(folder))

    def images(self, folder: Path) -> list[Path]:
        """Every image file below ``folder``, sorted; linked folders are not entered, so there are no rings.

        Every file whose suffix Pillow reads is an image; the others are counted, see `left_out`.
        """
        found: list[Path] = []
        for entry in _entries(folder):
            path = Path(entry.path)
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                found += self.images(path)
            elif readable(path):
                if entry.is_symlink():
                    inside(path, self.root)
                found.append(path)
            else:
                self._leave_out(path)
        if len(found) > MOST_FILES:
            raise UserError(f"{folder}: more than {MOST_FILES:,} images.")
        return found

    def beside(self, folder: Path) -> None:
        """Count the files in ``folder`` itself, which hold classes but belong to none."""
        loose = [Path(e.path) for e in _entries(folder) if not e.is_dir() and readable(Path(e.name))]
        if loose:
            self.note(
                f"{folder}: {len(loose)} images lie beside the class folders and belong to none: {loose[0].name} ..."
            )

    def _leave_out(self, path: Path) -> None:
        if path not in self._seen:
            self._seen.add(path)
            self._left_out[path.suffix.lower() or "no suffix"] += 1
            self._first = self._first or path

    def left_out(self) -> list[str]:
        """The notes, with what was left out for its suffix counted by suffix."""
        if not self._left_out:
            return list(self.notes)
        kinds = ", ".join(f"{suffix} {count}" for suffix, count in self._left_out.most_common(8))
        total = sum(self._left_out.values())
        counted = (
            f"{self.root}: {total} files are no images that Pillow reads and are left out ({kinds}): {self._first}"
        )
        return [*self.notes, counted + (" ..." if total > 1 else "")]


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
