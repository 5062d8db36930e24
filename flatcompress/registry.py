"""One mechanism for everything that is chosen by name: methods, models, data sets, importances, profiles.

A registry holds frozen records of plain data. A record names the thing, says in one line what it is and where
it comes from, and points to the function or class that does it; the defaults are read from that callable's own
signature, so they stand in one place. ``flatcompress list`` prints registries, the recipe's schema checks
against them and the tests run over them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flatcompress.errors import unknown


@dataclass(frozen=True)
class Entry:
    """One row: ``name`` -> ``make``. ``paper`` is an arXiv id or another short reference, or empty."""

    name: str
    make: Callable[..., Any]
    summary: str
    paper: str = ""

    @property
    def defaults(self) -> dict[str, Any]:
        """Keyword arguments of ``make`` that have a default, in order."""
        parameters = inspect.signature(self.make).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


class Registry(Mapping[str, Entry]):
    """An ordered mapping from name to `Entry`; an unknown name raises a UserError with the nearest spelling.

    >>> colours = Registry("colour")
    >>> _ = colours.add("red", lambda depth=1: depth, "warm")
    >>> colours["red"].defaults
    {'depth': 1}
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, make: Callable[..., Any], summary: str, paper: str = "") -> Entry:
        """Register ``make`` under ``name``. A name can be taken once."""
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        entry = self._entries[name] = Entry(name, make, summary, paper)
        return entry

    def __getitem__(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise unknown(self.kind, name, self._entries) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
