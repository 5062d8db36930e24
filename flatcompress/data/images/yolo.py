"""Images with boxes in YOLO's format: a text file beside each image, a row ``class x y width height`` a box."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from flatcompress.data.images.boxed import Boxed, Row, learned, raw_data, shares, size_of
from flatcompress.data.images.files import Finder, data_root
from flatcompress.data.images.layout import PART_OF, one_each, one_name
from flatcompress.data.raw_data import RawData
from flatcompress.errors import UserError
from flatcompress.yaml_source import parse_yaml

NAME = "yolo"
_TABLES = ("data.yaml", "data.yml", "dataset.yaml")


def yolo(
    seed: int,
    *,
    path: Any = None,
    images: str = "images",
    labels: str = "labels",
    classes: Any = None,
    held_out: Any = None,
    size: Any = 64,
    channels: int = 3,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    on_bad_sample: str = "error",
    intensity: Any = None,
    task: Any = None,
) -> RawData:
    """PATH/images/NAME and PATH/labels/NAME.txt, with centre, width and height as shares of the image's sides.

    The parts, where they are split already, are PATH/images/train or PATH/train/images, with ``valid`` or ``val`` and
    ``test``; otherwise the seed splits. Domains are PATH/DOMAIN/images and PATH/DOMAIN/labels; held_out is the one that
    is never trained on. classes: the names, default those of ``names`` in PATH/data.yaml. An image without a text file
    shows nothing. UserError names the file and the line.
    """
    root, chosen = data_root(path, NAME), learned(task, NAME)
    names = _names(root, classes)
    finder, items = Finder(root), []
    for part, domain, pictures, texts in _folders(root, finder, images, labels):
        items += _items(pictures, texts, part, domain, finder, root, len(names))
    if held_out is not None and not any(item.domain for item in items):
        raise UserError(f"data set {NAME!r}: held_out is a domain, and {root} has no folders DOMAIN/{images}.")
    return raw_data(
        seed,
        items,
        names,
        root=root,
        size=size,
        channels=channels,
        fractions={"test": test_fraction, "val": val_fraction},
        held_out=held_out,
        on_bad_sample=on_bad_sample,
        intensity=intensity,
        task=chosen,
        notes=finder.left_out(),
    )


def _names(root: Path, given: Any) -> tuple[str, ...]:
    """What the class numbers stand for: as given, or as the folder's YAML file says."""
    where = "data option 'classes'"
    if given is None:
        file = next((root / name for name in _TABLES if (root / name).is_file()), None)
        if file is None:
            raise UserError(f"data set {NAME!r}: name the classes with 'classes'; {root} has no {_TABLES[0]}.")
        try:
            found = parse_yaml(file.read_text(encoding="utf-8-sig"), str(file))[0]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read ({error}).") from None
        given, where = found.get("names") if isinstance(found, dict) else None, f"{file}: names"
    if isinstance(given, dict):
        whole = {int(k): v for k, v in given.items() if str(k).isdecimal()}
        given = [whole[i] for i in range(len(given))] if set(whole) == set(range(len(given))) else None
    names = [one_name(str(name)) for name in given] if isinstance(given, list | tuple) else []
    if not names or len(set(names)) < len(names):
        raise UserError(f"{where} is a list of different names, or a mapping of 0, 1 ... to them, found {given!r}.")
    return tuple(names)


def _folders(root: Path, finder: Finder, images: str, labels: str) -> list[tuple[str, str, Path, Path]]:
    """(part, domain, folder of images, folder of texts) of everything there is."""
    if (root / images).is_dir():
        parts = _parts(root / images, finder)
        if not parts:
            return [("", "", root / images, root / labels)]
        return [(part, "", folder, root / labels / folder.name) for part, folder in parts.items()]
    parts = _parts(root, finder)
    if parts:
        return [(part, "", folder / images, folder / labels) for part, folder in parts.items()]
    domains = [folder for folder in finder.subfolders(root) if (folder / images).is_dir()]
    if not domains:
        raise UserError(f"data set {NAME!r}: {root} has no folder {images!r}; name it with 'images'.")
    return [("", one_name(folder.name), folder / images, folder / labels) for folder in domains]


def _parts(folder: Path, finder: Finder) -> dict[str, Path]:
    named = {p: PART_OF[p.name.lower()] for p in finder.subfolders(folder) if p.name.lower() in PART_OF}
    return one_each(named, folder)


def _items(images: Path, labels: Path, part: str, domain: str, finder: Finder, root: Path, classes: int) -> list[Boxed]:
    for folder, key in ((images, "images"), (labels, "labels")):
        if not folder.is_dir():
            raise UserError(f"data set {NAME!r}: there is no folder {folder}; name it with {key!r}.")
    texts = {_key(p, labels): p for p in sorted(labels.rglob("*.txt")) if p.name != "classes.txt"}
    found: dict[str, Path] = {}
    items = []
    for image in finder.images(images):
        key = _key(image, images)
        if key in found:
            raise UserError(f"{image}: {found[key].name} has the same name, and both would have {key}.txt.")
        found[key] = image
        rows = _rows(texts[key], size_of(image, root), classes, finder) if key in texts else []
        items.append(Boxed(image, rows, part, domain))
    alone = next((text for key, text in texts.items() if key not in found), None)
    if alone is not None:
        raise UserError(f"{alone}: it has no image in {images}.")
    if not items:
        raise UserError(f"{images}: no image in it.")
    return items


def _key(path: Path, folder: Path) -> str:
    return one_name(path.relative_to(folder).with_suffix("").as_posix())


def _rows(path: Path, size: tuple[int, int], classes: int, finder: Finder) -> list[Row]:
    """The boxes of one text file; a row that is there twice is one box, and said."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None
    rows: dict[Row, None] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        label, x, y, width, height = _numbers(line.split(), where)
        if not 0 <= label < classes or label != int(label):
            raise UserError(f"{where}: class {label:g}; there are {classes} names, for 0 to {classes - 1}.")
        if max(map(abs, (x, y, width, height))) > 2:
            raise UserError(f"{where}: {line.strip()!r} looks like pixels; they are shares of the sides, 0 to 1.")
        across, down = size
        box = [(x - width / 2) * across, (y - height / 2) * down, (x + width / 2) * across, (y + height / 2) * down]
        row = shares(int(label), box, size, False, where)
        if row in rows:
            finder.note(f"{where}: a box that is there twice is taken once (and so elsewhere)")
        rows[row] = None
    return list(rows)


def _numbers(words: list[str], where: str) -> list[float]:
    if len(words) != 5:
        more = " Polygons and turned boxes are not read." if len(words) > 5 else ""
        raise UserError(f"{where}: {len(words)} values; a box is class x y width height.{more}")
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise UserError(f"{where}: {' '.join(words)[:60]!r} are no numbers.")
    return values
