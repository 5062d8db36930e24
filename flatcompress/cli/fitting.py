"""A starter recipe for images that are at hand: what is in their folder decides size, batches and epochs."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from flatcompress.cli.templates import STARTERS
from flatcompress.data.images.files import Finder, data_root
from flatcompress.data.images.layout import PART_OF, class_folders, one_name, parts_of
from flatcompress.errors import UserError

TRAINED_ON = 0.7  # of the images, where the folder has no parts of its own
OPENED = 64  # images whose size is looked at
SIZES = (16, 48)  # pixels a side; larger ones see more and cost more, and a first file should not take long
BATCHES = (8, 16, 32, 64)
LEAST_STEPS = 6  # in an epoch
STEPS = 200  # optimizer steps in which a small network learns a few clear classes
EPOCHS = (10, 50)  # of the train stage
LATER = (0.4, 0.25)  # of them, in the prune and in the quantize stage


@dataclass(frozen=True)
class Found:
    """What a folder of images holds. ``domains``: empty where its folders are the classes."""

    classes: tuple[str, ...]
    domains: tuple[str, ...]
    images: int
    training: int
    side: int

    def __str__(self) -> str:
        named = ", ".join(self.classes[:6]) + (" ..." if len(self.classes) > 6 else "")
        domains = f" in {len(self.domains)} domains ({', '.join(self.domains[:6])})" if self.domains else ""
        return f"{len(self.classes)} classes ({named}){domains}, {self.images:,} images of about {self.side} pixels"


def look(path: Path) -> Found:
    """Count what is in a folder of classes, of parts or of domains; nothing but headers is read.

    UserError where it holds no images in class folders, those of one class alone, or an empty one.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: --data takes a folder of images with a folder for each class.")
    root = data_root(path, "folder")
    finder = Finder(root)
    domains = _domains(root, finder)
    parts = {} if domains else parts_of(root, finder)
    holders = domains or list(parts.values()) or [root]
    files = {holder: _files(holder, finder) for holder in holders}
    first = files[parts.get("train", holders[0])]
    every = [file for classes in files.values() for found in classes.values() for file in found]
    if not every:
        raise UserError(f"{root}: no folders of images, one a class (CLASS/image), or domains of them.")
    if len(first) < 2:
        raise UserError(f"{root}: images of one class alone ({', '.join(first)}); at least two classes are needed.")
    for name, found in first.items():
        if not found:
            raise UserError(f"{root}: the class {name} is empty: no image in it. Remove the folder or fill it.")
    seen = (len(domains) - 1) / len(domains) if domains else 1.0  # one is held out
    training = sum(map(len, first.values())) if parts else round(TRAINED_ON * seen * len(every))
    return Found(tuple(first), tuple(p.name for p in domains), len(every), training, _side(every))


def _files(folder: Path, finder: Finder) -> dict[str, list[Path]]:
    """The image files of every class below ``folder``."""
    return {c.name: [file for x in c.folders for file in finder.images(x)] for c in class_folders(folder, finder)}


def _domains(root: Path, finder: Finder) -> list[Path]:
    """The folders of ``root`` where each of them holds the same folders, and they are no parts."""
    entries = finder.subfolders(root)
    inner = [{one_name(p.name) for p in finder.subfolders(path)} for path in entries if finder.holds_folders(path)]
    named = any(path.name.lower() in PART_OF for path in entries)
    alike = len(entries) > 1 and len(inner) == len(entries) and all(found == inner[0] for found in inner)
    return entries if alike and not named else []


def _side(files: list[Path]) -> int:
    """The median of the shorter sides, of some of ``files``; one that cannot be read is the loader's to refuse."""
    sides = []
    for file in files[:: max(1, len(files) // OPENED)]:
        try:
            with Image.open(file) as image:
                sides.append(min(image.size))
        except (OSError, ValueError, SyntaxError):
            continue
    return round(statistics.median(sides)) if sides else SIZES[1]


def fitted(path: Path) -> tuple[str, str]:
    """The recipe for the images below ``path``, and two sentences: what was found, what was chosen.

    The smallest of the median side and 48 pixels; batches that leave six steps in an epoch or more; epochs for some
    hundred steps, so that a few hundred images are done in minutes. UserError as of `look`.
    """
    found = look(path)
    size = min(SIZES[1], max(SIZES[0], found.side // 8 * 8))
    batch = max(b for b in BATCHES if b == BATCHES[0] or b * LEAST_STEPS <= found.training)
    steps = max(1, found.training // batch)
    epochs = min(EPOCHS[1], max(EPOCHS[0], round(STEPS / steps)))
    counts = [epochs, *(max(3, round(share * epochs)) for share in LATER)]
    text = _filled(path, found, size, batch, counts)
    chosen = f"{size} pixels, batches of {batch}, {' + '.join(map(str, counts))} epochs"
    if found.domains:
        chosen += f", {found.domains[-1]} held out (data.held_out names another)"
    return text, f"{path}: {found}. Chosen: {chosen}."


def _filled(path: Path, found: Found, size: int, batch: int, counts: list[int]) -> str:
    """The starter for folders, with the images' own ``data`` section, the folder's name and the epochs ``counts``."""
    keys = {"name": "domains" if found.domains else "folder", "path": json.dumps(str(path), ensure_ascii=False)}
    if found.domains:
        keys["held_out"] = json.dumps(found.domains[-1], ensure_ascii=False)
    keys |= {"size": str(size), "batch_size": str(batch)}
    listed = ", ".join(f"{key}: {value}" for key, value in keys.items())
    line = f"data: {{{listed}}}  # a larger size sees more and takes longer"
    text = re.sub(r"^data: .*$", lambda _: line, STARTERS["folder"], count=1, flags=re.M)
    name = re.sub(r"[^A-Za-z0-9]+", "-", path.resolve().name).strip("-") or "my-images"
    left = iter(counts)
    return re.sub(r"(?<=epochs: )\d+", lambda _: str(next(left)), text.replace("my-images", name))
