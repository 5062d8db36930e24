"""What a data set's function returns: raw parts, before normalisation, augmentation and corruption."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from flatcompress.data.bundle import Part
from flatcompress.errors import UserError, unknown


@dataclass(frozen=True)
class RawData:
    """Parts of a data set; ``domain_ids`` count positions in ``domains``. ``task``: name of what its targets are."""

    classes: tuple[str, ...]
    train: Part
    val: Part
    test: Part
    held_out: Part | None = None
    domains: tuple[str, ...] = ()
    held_out_domain: str | None = None
    corrupted: dict[str, Part] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    intensity: tuple[float, float] | None = None
    task: str = "classification"
    held_out_seen: Part | None = None


def held_out_name(value: Any, domains: Iterable[str]) -> str | None:
    """The held-out domain's name; None, "" and "none" mean none. UserError lists the domains otherwise."""
    names = tuple(domains)
    if value is None or str(value).lower() in ("", "none"):
        return None
    if str(value) not in names:
        raise unknown("held_out domain", str(value), names)
    return str(value)


def training_domains(data_set: str, chosen: Any, domains: Iterable[str], unseen: str | None) -> list[str]:
    """The domains to train on: those chosen, else all but the held-out one. UserError for others and for that one."""
    known = tuple(domains)
    if chosen is None:
        return [name for name in known if name != unseen]
    if not isinstance(chosen, list | tuple) or not chosen:
        raise UserError(f"{data_set}: domains must be a list of {', '.join(known)}, found {chosen!r}")
    names = list(dict.fromkeys(map(str, chosen)))
    for name in names:
        if name not in known:
            raise unknown(f"domain of {data_set}", name, known)
        if name == unseen:
            raise UserError(f"{data_set}: domain {name!r} is held out and cannot be trained on as well")
    return names
