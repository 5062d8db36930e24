"""Images with boxes in COCO's JSON format (cocodataset.org, "object detection")."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flatcompress.data.images.boxed import Boxed, Row, learned, raw_data, shares, size_of
from flatcompress.data.images.files import Finder, data_root
from flatcompress.data.images.layout import PART_OF, PARTS, one_name
from flatcompress.data.raw_data import RawData
from flatcompress.errors import UserError, unknown

NAME = "coco"
_MOST_BYTES = 2 << 30


def coco(
    seed: int,
    *,
    path: Any = None,
    annotations: Any = None,
    images: Any = None,
    classes: Any = None,
    domain: Any = None,
    held_out: Any = None,
    size: Any = 64,
    channels: int = 3,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    on_bad_sample: str = "error",
    intensity: Any = None,
    task: Any = None,
) -> RawData:
    """Images below PATH and COCO annotations: one JSON file, split by the seed, or one for each of train, val, test.

    annotations: the file, or {train: FILE, val: FILE}; default: the JSON files in PATH and PATH/annotations, told apart
    by the part in their names (instances_train2017.json). images: the folder that file names start from; default: PATH,
    its ``images``, or the folder of the part's name (train2017). classes: the categories that are learned, default all.
    domain: a key of the image records, or ``folder``: the first folder of a file's name; held_out: the one that is
    never trained on. Crowds (iscrowd) are ignored, neither right nor wrong. Images are brought to ``size`` without
    keeping their aspect. UserError names the image or the annotation.
    """
    root, chosen = data_root(path, NAME), learned(task, NAME)
    files = _files(root, annotations)
    read = {part: _read(file) for part, file in files.items()}
    names = _classes(read, files, classes)
    finder, left_out = Finder(root), Counter[str]()
    items = [
        item
        for part, found in read.items()
        for item in _items(found, files[part], part, root, images, names, domain, left_out)
    ]
    twice = next((p for p, n in Counter(item.path for item in items).items() if n > 1), None)
    if twice is not None:
        raise UserError(f"data set {NAME!r}: {twice} is in the annotations twice.")
    if left_out:
        kinds = ", ".join(f"{name} {n}" for name, n in left_out.most_common(5))
        finder.note(f"{root}: boxes of categories that 'classes' does not name are left out ({kinds})")
    if held_out is not None and domain is None:
        raise UserError(f"data set {NAME!r}: held_out is a domain; say with 'domain' where an image's stands.")
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
        notes=finder.notes,
    )


def _files(root: Path, given: Any) -> dict[str, Path]:
    """The annotation file of each part; "" where there is one for all."""
    if isinstance(given, Mapping):
        strange = next((key for key in given if str(key).lower() not in PART_OF), None)
        if strange is not None or not given:
            raise UserError(f"data option 'annotations' maps train, val and test to files, found {given!r}.")
        found = {PART_OF[str(key).lower()]: _file(root, name) for key, name in given.items()}
        return _with_train(found, root)
    if given is not None:
        return {"": _file(root, given)}
    there = sorted(p for folder in (root, root / "annotations") if folder.is_dir() for p in folder.glob("*.json"))
    boxes = [p for p in there if p.name.startswith("instances_")] or there
    if len(boxes) == 1:
        return {"": boxes[0]}
    parts: dict[str, Path] = {}
    for file in boxes:
        said = [PART_OF[word] for word in re.findall("[a-z]+", file.stem.lower()) if word in PART_OF]
        if len(set(said)) != 1 or said[0] in parts:
            parts = {}
            break
        parts[said[0]] = file
    if not parts:
        shown = ", ".join(p.name for p in boxes[:6]) or "none"
        raise UserError(f"data set {NAME!r}: name the JSON file with 'annotations', or one a part; {root} has {shown}.")
    return _with_train(parts, root)


def _with_train(found: dict[str, Path], root: Path) -> dict[str, Path]:
    if "train" not in found or len(found) < 2:
        raise UserError(f"{root}: annotations of {', '.join(found)} alone; train and one of val and test are needed.")
    return {part: found[part] for part in PARTS if part in found}


def _file(root: Path, given: Any) -> Path:
    for path in (Path(str(given)).expanduser(), root / str(given), root / "annotations" / str(given)):
        if path.is_file():
            return path
    raise UserError(f"data set {NAME!r}: there is no file {str(given)!r}, neither by itself nor in {root}.")


def _read(path: Path) -> dict[str, Any]:
    """The file's content, its lists of objects with different ids."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path}: more than 2 GiB.")
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON ({str(error)[:120]}).") from None
    for key in ("images", "annotations", "categories"):
        rows = raw.get(key) if isinstance(raw, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path}: no COCO file: it has no list {key!r}.")
        ids = [row.get("id") for row in rows]
        wrong = next((i for i, value in enumerate(ids) if type(value) not in (int, str)), None)
        if wrong is not None and not (key == "annotations" and all(value is None for value in ids)):
            raise UserError(f"{path}: {key}[{wrong}] has no id.")
        twice = next((value for value, n in Counter(ids).items() if n > 1 and value is not None), None)
        if twice is not None:
            raise UserError(f"{path}: two {key} have the id {twice!r}.")
    if not raw["images"]:
        raise UserError(f"{path}: no image in it.")
    return raw


def _classes(read: dict[str, dict[str, Any]], files: dict[str, Path], wanted: Any) -> tuple[str, ...]:
    """Names of the categories, by their ids; every part must have the same ones."""
    found: dict[str, list[tuple[Any, str]]] = {}
    for part, raw in read.items():
        named = [(row["id"], row.get("name")) for row in raw["categories"]]
        bad = next((i for i, name in named if not isinstance(name, str) or not name.strip()), None)
        if bad is not None or not named:
            problem = f"category {bad!r} has no name" if named else "no category in it"
            raise UserError(f"{files[part]}: {problem}.")
        rows = [(i, one_name(str(name))) for i, name in named]
        found[part] = sorted(rows, key=lambda row: (str(type(row[0])), row[0]))
    first, *others = found
    for part in others:
        if found[part] != found[first]:
            raise UserError(f"{files[part]}: its categories are not those of {files[first].name}.")
    names = tuple(name for _, name in found[first])
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UserError(f"{files[first]}: two categories are called {twice!r}.")
    if wanted is None:
        return names
    if not isinstance(wanted, list | tuple) or not wanted or len(set(map(str, wanted))) < len(wanted):
        raise UserError(f"data option 'classes' is a list of different category names, found {wanted!r}.")
    for name in wanted:
        if str(name) not in names:
            raise unknown(f"category of {files[first].name}", str(name), names)
    return tuple(str(name) for name in wanted)


def _items(
    raw: dict[str, Any],
    file: Path,
    part: str,
    root: Path,
    images: Any,
    names: tuple[str, ...],
    domain: Any,
    left_out: Counter[str],
) -> list[Boxed]:
    """The images of one file with their boxes."""
    records = {row["id"]: row for row in raw["images"]}
    for key, row in records.items():
        if not isinstance(row.get("file_name"), str) or not row["file_name"]:
            raise UserError(f"{file}: image {key!r} has no file_name.")
    folder = _folder(root, images, file, next(iter(records.values()))["file_name"])
    paths = {key: folder / row["file_name"] for key, row in records.items()}
    sizes = {key: _size(records[key], path, root, file) for key, path in paths.items()}
    categories = {row["id"]: one_name(str(row["name"])) for row in raw["categories"]}
    boxes: dict[Any, list[Row]] = {key: [] for key in records}
    for i, row in enumerate(raw["annotations"]):
        where = f"{file}: annotation {row.get('id', i)!r}"
        for key, known in (("image_id", records), ("category_id", categories)):
            value = row.get(key)
            if type(value) not in (int, str) or value not in known:
                raise UserError(f"{where}: {key} {value!r} is none of the file's.")
        name = categories[row["category_id"]]
        box = _corners(row.get("bbox"), where)
        found = shares(0, box, sizes[row["image_id"]], row.get("iscrowd") in (1, True), where)
        if name in names:
            boxes[row["image_id"]].append((names.index(name), *found[1:]))
        else:
            left_out[name] += 1
    return [Boxed(paths[key], boxes[key], part, _domain(row, domain, file)) for key, row in records.items()]


def _corners(box: Any, where: str) -> tuple[float, float, float, float]:
    good = isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) and math.isfinite(v) for v in box)
    if not good:
        raise UserError(f"{where}: bbox is [x, y, width, height] in pixels, found {str(box)[:80]}.")
    x, y, width, height = map(float, box)
    return x, y, x + width, y + height


def _folder(root: Path, given: Any, file: Path, first: str) -> Path:
    """The folder that the file names of ``file`` start from."""
    if given is not None:
        folder = root / str(given)
        if not folder.is_dir():
            raise UserError(f"data set {NAME!r}: there is no folder {folder}; name it with 'images'.")
        return folder
    part = file.stem.rsplit("_", 1)[-1]
    tried = [root, root / "images", root / part, root / "images" / part]
    found = next((folder for folder in tried if (folder / first).is_file()), None)
    if found is None:
        raise UserError(f"{file}: there is no image {first!r} in {root}; name the folder it is in with 'images'.")
    return found


def _size(record: dict[str, Any], path: Path, root: Path, file: Path) -> tuple[int, int]:
    """The image's own size, which must be the record's."""
    found = size_of(path, root)
    told = (record.get("width"), record.get("height"))
    if told != (None, None) and told != found:
        there = f"{path.name} is {found[0]} x {found[1]}"
        raise UserError(f"{file}: image {record['id']!r} is {told[0]} x {told[1]} by the annotations, and {there}.")
    return found


def _domain(record: dict[str, Any], key: Any, file: Path) -> str:
    if key is None:
        return ""
    if key == "folder":
        folders = Path(record["file_name"]).parts[:-1]
        if not folders:
            raise UserError(f"{file}: image {record['id']!r} lies in no folder, which domain: folder is read from.")
        return one_name(folders[0])
    if type(record.get(key)) not in (int, str) or record[key] == "":
        raise UserError(f"{file}: image {record['id']!r} has no {key!r}, which its domain is read from.")
    return one_name(str(record[key]))
