"""What the folders of a data set mean: its parts by their usual names, its classes, and what nobody can tell."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flatcompress.data.images.files import Finder
from flatcompress.errors import UserError

PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
PART_OF = {name: part for part, names in PARTS.items() for name in names}
_ALLOWED = "; ".join(f"{part}: {' or '.join(names)}" for part, names in PARTS.items())


@dataclass(frozen=True)
class ClassFolder:
    """One class: its name in Unicode's NFC form, and its folders (two where both forms of the name are there)."""

    name: str
    folders: tuple[Path, ...]


def one_name(name: str) -> str:
    """``name`` in NFC: Caf\\u00e9 typed on one system and on another is one class.

    >>> one_name("Cafe\\u0301") == "Caf\\u00e9"
    True
    """
    return unicodedata.normalize("NFC", name)


def class_folders(folder: Path, finder: Finder) -> list[ClassFolder]:
    """The classes below ``folder``, sorted by name."""
    found: dict[str, list[Path]] = {}
    for path in finder.subfolders(folder):
        found.setdefault(one_name(path.name), []).append(path)
    return [ClassFolder(name, tuple(found[name])) for name in sorted(found)]


def parts_of(root: Path, finder: Finder) -> dict[str, Path]:
    """{"train", "val", "test": folder} where ``root`` is split by its owner, or {} where its folders are classes.

    The names are those of `PARTS` in any case. UserError, with the reason, where it could be read in two ways.
    """
    entries = finder.subfolders(root)
    named = {path: PART_OF[path.name.lower()] for path in entries if path.name.lower() in PART_OF}
    holders = {path: part for path, part in named.items() if finder.holds_folders(path)}
    if not holders:
        _refuse_parts_without_classes(root, named)
        _refuse_nested(root, entries, finder)
        return {}
    parts = one_each(holders, root)
    if "train" not in parts or len(parts) < 2:
        raise UserError(
            f"{root}: {_listed(holders)} holds class folders, but there is no {_missing(parts)} beside it. Name the "
            f"parts ({_ALLOWED}), or give the folder of the classes itself with 'path' to have it split."
        )
    others = [path for path in entries if path not in holders]
    if others:
        finder.note(f"{root}: not one of the parts {', '.join(sorted(parts))} and not read: {_listed(others)}")
    return parts


def one_each(folders: Mapping[Path, str], root: Path) -> dict[str, Path]:
    """The folder of each part. UserError where two are the same one."""
    parts: dict[str, Path] = {}
    for path, part in folders.items():
        if part in parts:
            raise UserError(
                f"{root}: {parts[part].name!r} and {path.name!r} are both the {part} part. Keep one of them."
            )
        parts[part] = path
    return parts


def _missing(parts: dict[str, Path]) -> str:
    return "training part" if "train" not in parts else "val or test part"


def _refuse_parts_without_classes(root: Path, named: dict[Path, str]) -> None:
    if len(set(named.values())) > 1:
        raise UserError(
            f"{root}: {_listed(named)} look like the parts of a data set, but hold images and no class folders. "
            "Expected PART/CLASS/image; rename them if they are the classes."
        )


def _refuse_nested(root: Path, entries: Sequence[Path], finder: Finder) -> None:
    """Folders that hold no image of their own but all the same folders are parts, folds or domains, not classes."""
    if len(entries) < 2:
        return
    inner = [tuple(one_name(p.name) for p in finder.subfolders(path)) for path in entries]
    if any(finder.holds_images(path) for path in entries) or not all(inner):
        return
    shared = set(inner[0]).intersection(*inner[1:])
    if not shared and not all(_sounds_like_a_part(path.name) for path in entries):
        return
    why = f"each hold the folders {', '.join(sorted(shared)[:4])}" if shared else "sound like parts of a data set"
    raise UserError(
        f"{root}: {_listed(entries)} {why}, so they are hardly the classes. Domains: use data.name domains. Parts: "
        f"name them so that they are understood ({_ALLOWED}). Classes: give the folder that holds them with 'path'."
    )


def _sounds_like_a_part(name: str) -> bool:
    return any(word in PART_OF for word in re.split(r"[^a-z]+", name.lower()))


def same_classes(found: dict[str, Sequence[str]], root: Path) -> None:
    """UserError that names the classes in which the folders ``found`` (name -> classes) differ."""
    first, *rest = found
    for name in rest:
        different = sorted(set(found[first]) ^ set(found[name]))
        if not different:
            continue
        alike = {c.casefold() for c in found[first]} == {c.casefold() for c in found[name]}
        hint = " They differ in capital letters alone: rename one of them." if alike else ""
        raise UserError(
            f"{root}: every part needs the same classes; {first!r} and {name!r} differ in {', '.join(different[:10])}."
            f"{hint}"
        )


def _listed(paths: Sequence[Path] | dict[Path, str]) -> str:
    names = [repr(path.name) for path in paths]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
