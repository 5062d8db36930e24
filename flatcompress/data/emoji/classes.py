"""Which emoji belong to which class: Unicode's subgroups, near ones joined, and what is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from flatcompress.data.emoji.packages import key
from flatcompress.errors import UserError

# Flags, symbols of one stroke and the like are left out: they look the same in every hand.
CLASSES: dict[str, tuple[str, ...]] = {
    "air-and-water-vehicle": ("transport-air", "transport-water"),
    "bird": ("animal-bird",),
    "bug": ("animal-bug",),
    "building": ("place-building", "place-religious"),
    "clock": ("time",),
    "clothing": ("clothing",),
    "drink": ("drink",),
    "electronics": ("computer", "phone", "light & video", "sound"),
    "face": ("face-smiling", "face-affection", "face-tongue", "face-hand", "face-neutral-skeptical", "face-sleepy",
             "face-unwell", "face-hat", "face-glasses", "face-concerned", "face-negative", "face-costume"),
    "hand": ("hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed", "hands",
             "hand-prop"),
    "household": ("household",),
    "mammal": ("animal-mammal",),
    "meal": ("food-prepared", "food-asian", "food-sweet"),
    "music": ("music", "musical-instrument"),
    "paper": ("book-paper", "mail", "office", "writing", "money"),
    "person": ("person", "person-role", "person-fantasy", "person-gesture", "person-activity"),
    "plant": ("plant-flower", "plant-other"),
    "produce": ("food-fruit", "food-vegetable"),
    "road-vehicle": ("transport-ground",),
    "sea-animal-and-reptile": ("animal-marine", "animal-reptile", "animal-amphibian"),
    "sign": ("transport-sign", "warning", "av-symbol", "religion", "zodiac"),
    "sky": ("sky & weather",),
    "sport": ("sport", "award-medal"),
    "tool": ("tool", "science", "medical"),
}  # fmt: skip
_OF_SUBGROUP = {subgroup: name for name, subgroups in CLASSES.items() for subgroup in subgroups}
MOST = 60  # of a class
_CODE = re.compile(r"[0-9a-f]+(-[0-9a-f]+)*")  # it becomes a file's name


def chosen(metadata: bytes) -> dict[str, str]:
    """{emoji's key: class}, of what ``metadata`` (emoji-datasource's emoji.json) lists, by class and order.

    The same drawing with another sex, skin or direction is one emoji: only the one without a sign for it counts.
    UserError where the file is not what it should be.
    """
    try:
        listed = json.loads(metadata)
        rows = [(key(entry["image"]), _OF_SUBGROUP.get(entry["subcategory"]), entry["sort_order"]) for entry in listed]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the list of emoji cannot be read ({type(error).__name__}: {error}).") from None
    members: dict[str, list[tuple[int, str]]] = {}
    for code, name, order in rows:
        if not _CODE.fullmatch(code):
            raise UserError(f"the list of emoji names {code[:40]!r}, which are no code points.")
        if name is not None and not is_variant(code):
            members.setdefault(name, []).append((order, code))
    return {code: name for name in sorted(members) for _, code in sorted(members[name])}


def is_variant(code: str) -> bool:
    """Is it drawn like another emoji, but for its sex, its skin or the way it looks?

    >>> is_variant("1f3c3-200d-2642"), is_variant("1f468-200d-1f33e"), is_variant("1f9d1-200d-1f33e")
    (True, True, False)
    """
    parts = code.split("-")
    joined = "200d" in parts
    signs = {"2640", "2642", "27a1", "1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
    return (len(parts) > 1 and bool(signs & set(parts))) or (joined and parts[0] in ("1f468", "1f469"))


def capped(classes: Mapping[str, str], most: int) -> dict[str, str]:
    """At most ``most`` of a class, spread evenly over its order, so that every subgroup keeps its share."""
    members: dict[str, list[str]] = {}
    for code, name in classes.items():
        members.setdefault(name, []).append(code)
    kept: dict[str, str] = {}
    for name, codes in members.items():
        count = min(most, len(codes))
        kept |= {codes[i * len(codes) // count]: name for i in range(count)}
    return kept
