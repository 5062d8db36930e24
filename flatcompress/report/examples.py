"""Pictures that say more than a figure: the worst mistakes, and what corruption does to an image."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from flatcompress.report import said
from flatcompress.report.gather import Run
from flatcompress.report.numbers import number, percent, records, text

WORST = 24
PER_CORRUPTION = 4
MAX_IMAGE = 1 << 18
SCHEMA = 1
_BASE64 = re.compile(r"[A-Za-z0-9+/=]*")


@dataclass(frozen=True)
class Wanted:
    """Sample ``index`` of ``part`` ("test", "held_out" or "corruption/severity")."""

    part: str
    index: int


def wanted(run: Run) -> list[Wanted]:
    """The samples whose pictures the page shows: mistakes of the last network, and each corruption at its hardest."""
    final = said.last(run)
    if final is None:
        return []
    chosen = [Wanted(part, i) for part in said.PARTS if part in final.parts for i in _worst(final.parts[part])]
    for part in _hardest(final):
        chosen += [Wanted(part, i) for i in _spread(len(final.parts[part].labels))]
    return chosen


def file_of(pictures: list[tuple[Wanted, str]]) -> dict[str, Any]:
    """What examples.json holds: each sample with its picture, a data URI of a PNG."""
    return {"schema": SCHEMA, "pictures": [{**asdict(w), "image": image} for w, image in pictures]}


def _spread(samples: int) -> list[int]:
    """A few of ``samples`` at even distances: the first ones are of one class where a folder is read class by class."""
    return sorted({k * samples // PER_CORRUPTION for k in range(PER_CORRUPTION)}) if samples else []


def _worst(part: said.Said) -> list[int]:
    """The confident mistakes first."""
    wrong = [i for i, (a, b) in enumerate(zip(part.labels, part.predicted)) if a != b]
    return sorted(wrong, key=lambda i: (-part.confidence[i], i))[:WORST]


def _hardest(network: said.Network) -> list[str]:
    """Of each corruption the severity with the fewest hits."""
    found: dict[str, tuple[float, str]] = {}
    for name, part in network.parts.items():
        kind, slash, _ = name.rpartition("/")
        if slash and part.samples:
            share = sum(n for (a, b), n in part.counts.items() if a == b) / part.samples
            found[kind] = min(found.get(kind, (2.0, "")), (share, name))
    return [name for _, name in found.values()]


def _images(run: Run) -> dict[tuple[str, int], str]:
    found = {}
    for row in records(run.examples.get("pictures"))[:2000]:
        image, index = row.get("image"), number(row.get("index"))
        if isinstance(image, str) and image.startswith("data:image/png;base64,") and len(image) <= MAX_IMAGE:
            body = image.split(",", 1)[1]
            if index is not None and _BASE64.fullmatch(body):
                found[text(row.get("part"), 80), int(index)] = image
    return found


def shown(run: Run) -> dict[str, Any]:
    """``worst``: per part the mistakes with what float and file said; ``corruptions``: per kind its pictures.

    ``drawn``: per part the pictures that the task has drawn its outputs into, where it has no classes of whole samples.
    """
    images, final, before = _images(run), said.last(run), said.float_network(run)
    if not images or final is None:
        return {"worst": [], "corruptions": [], "drawn": _drawn(images)}
    names = said.class_names(run)
    worst = []
    for part, title in said.PARTS.items():
        if part not in final.parts:
            continue
        base = before.parts.get(part) if before is not None and before.name != final.name else None
        rows = [
            {"image": images[part, i], **_row(final.parts[part], base, i, names)}
            for i in _worst(final.parts[part])
            if (part, i) in images
        ]
        if rows:
            worst.append({"part": title, "rows": rows, "float": base is not None})
    corruptions = []
    for part in _hardest(final):
        now = final.parts[part]
        rows = [
            {"image": images[part, i], **_row(now, None, i, names)}
            for i in range(len(now.labels))
            if (part, i) in images
        ]
        if rows:
            corruptions.append({"kind": text(part, 60), "rows": rows})
    return {"worst": worst, "corruptions": corruptions, "drawn": []}


def _drawn(images: dict[tuple[str, int], str]) -> list[dict[str, Any]]:
    parts = {title: [image for (of, _), image in images.items() if of == part] for part, title in said.PARTS.items()}
    return [{"part": title, "images": found} for title, found in parts.items() if found]


def _row(now: said.Said, base: said.Said | None, i: int, names: list[str]) -> dict[str, Any]:
    label = now.labels[i]
    row = {
        "label": said.class_name(names, label),
        "file": said.class_name(names, now.predicted[i]),
        "sure": percent(now.confidence[i], 0),
        "right": now.predicted[i] == label,
        "float": "",
        "float_sure": "",
        "float_right": False,
    }
    if base is not None and i < len(base.labels) and base.labels[i] == label:
        row |= {
            "float": said.class_name(names, base.predicted[i]),
            "float_sure": percent(base.confidence[i], 0),
            "float_right": base.predicted[i] == label,
        }
    return row
