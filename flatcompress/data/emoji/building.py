"""``flatcompress data emoji-domains``: DOMAIN/CLASS/CODE.png from the packages of several vendors."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from flatcompress.data.emoji import drawing, packages
from flatcompress.data.emoji.classes import MOST, capped, chosen
from flatcompress.data.emoji.packages import PACKAGES, Package
from flatcompress.errors import UserError, unknown
from flatcompress.storage import to_json, write_error

SIZES = (16, 512)
_COLUMNS, _TILE, _LABEL, _GAP = 24, 32, 80, 2


def build(
    source: Path,
    out: Path,
    size: int = 64,
    domains: Sequence[str] = packages.DOMAINS,
    most: int = MOST,
    table: Sequence[Package] = PACKAGES,
) -> dict[str, Any]:
    """Write the pictures that every one of ``domains`` has of the same emoji; returns the counts.

    ``source``: the folder of the archives; ``most``: identities of a class at most. Beside the domains' folders lie
    ``contact-sheet.png``, ``counts.json`` and ``LICENSES.txt``. Nothing is left behind where it fails. UserError for a
    missing or another package, domains and sizes that are not to be had, and a folder that is not empty.
    """
    taken = _chosen(domains, table)
    if not SIZES[0] <= size <= SIZES[1] or most < 3:
        raise UserError(f"size must lie in {SIZES[0]}..{SIZES[1]} and most be 3 or more, found {size} and {most}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already. Give another folder with --out, or remove it.")
    listing = next((package for package in table if package.metadata), None)
    if listing is None:
        raise UserError("no package lists the emoji and their subgroups.")
    archives = packages.found(source, tuple(dict.fromkeys([*taken, listing])))
    if any(package.suffix == ".svg" for package in taken):
        drawing.needs_resvg()
    classes = chosen(packages.member(archives[listing.domain], listing.metadata))
    held = {package.domain: dict(packages.pictures(archives[package.domain], package)) for package in taken}
    shared = {code: name for code, name in classes.items() if all(code in found for found in held.values())}
    kept = capped(shared, most)
    if not kept:
        raise UserError(f"{source}: the packages have no emoji in common.")
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        counts = _write(partial, size, taken, held, kept)
        counts["left_out"] = {
            "not in every package": len(classes) - len(shared), f"more than {most} of a class": len(shared) - len(kept)
        }  # fmt: skip
        (partial / "counts.json").write_text(to_json(counts, 1) + "\n")
        (partial / "LICENSES.txt").write_text(_licences(taken))
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise write_error(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {"folder": str(out), **counts}


def _chosen(domains: Sequence[str], table: Sequence[Package]) -> list[Package]:
    by_name = {package.domain: package for package in table}
    for name in domains:
        if name not in by_name:
            raise unknown("domain", name, by_name)
    taken = [by_name[name] for name in dict.fromkeys(domains)]
    if len(taken) < 2:
        raise UserError(f"domains: two of {', '.join(by_name)} or more, found {', '.join(domains) or 'none'}.")
    return taken


def _write(
    out: Path, size: int, taken: Sequence[Package], held: dict[str, dict[str, bytes]], kept: dict[str, str]
) -> dict[str, Any]:
    names = sorted(set(kept.values()))
    sheet = Image.new("RGB", (_LABEL + _COLUMNS * (_TILE + _GAP), len(taken) * (_TILE + _GAP)), "white")
    first = {name: next(code for code, own in kept.items() if own == name) for name in names}
    for row, package in enumerate(taken):
        for name in names:
            (out / package.domain / name).mkdir(parents=True)
        for code, name in kept.items():
            content, where = held[package.domain][code], f"{package.file}: {code}{package.suffix}"
            drawn = drawing.on_ground(drawing.picture(content, package.suffix, size, where), package.domain, code)
            drawn.save(out / package.domain / name / f"{code}.png")
            if code == first[name] and names.index(name) < _COLUMNS:
                tile = drawn.resize((_TILE, _TILE), Image.Resampling.LANCZOS)
                sheet.paste(tile, (_LABEL + names.index(name) * (_TILE + _GAP), row * (_TILE + _GAP)))
        draw = ImageDraw.Draw(sheet)
        draw.text((4, row * (_TILE + _GAP) + 8), package.domain, "black", ImageFont.load_default(12))
    content_file = io.BytesIO()
    sheet.save(content_file, format="PNG")
    (out / "contact-sheet.png").write_bytes(content_file.getvalue())
    per_class = {name: sum(own == name for own in kept.values()) for name in names}
    return {
        "domains": [package.domain for package in taken],
        "classes": per_class,
        "identities": len(kept),
        "images": len(kept) * len(taken),
        "size": size,
        "packages": {package.file: package.sha256 for package in taken},
    }


def _licences(taken: Sequence[Package]) -> str:
    lines = [f"{p.domain}: {p.artwork}, {p.licence}, from {p.name} {p.version}" for p in taken]
    return (
        "The pictures in this folder are made from other people's artwork and stay under its licences:\n"
        + "\n".join(lines)
        + "\nChanged: cut to what is drawn, scaled, put on a light ground. CC-BY and CC-BY-SA ask for the names above "
        "where you pass them on, and CC-BY-SA for the same licence.\n"
    )
