"""One mechanism for everything that is chosen by name: methods, models, data sets, importances, profiles.

A registry holds frozen records of plain data. A record names the thing, says in one line what it is and where
it comes from, and points to the function or class that does it; the defaults are read from that callable's own
signature, so they stand in one place. What others must know about a row stands on the row too, as `Entry.facts`,
so nobody compares names. ``flatcompress list`` prints registries, the recipe's schema checks against them and the
tests run over them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

from flatcompress import extensions
from flatcompress.errors import unknown

Facts = TypeVar("Facts")


@dataclass(frozen=True)
class NoFacts:
    """There is nothing to know about such a row beside what it makes."""


@dataclass(frozen=True)
class Entry(Generic[Facts]):
    """One row: ``name`` -> ``make``; calling the row calls ``make``.

    ``paper`` is an arXiv id or another short reference, or empty. ``facts``: what others must know of the row.
    ``origin``: "flatcompress", or the distribution or module that added the row.
    """

    name: str
    make: Callable[..., Any]
    summary: str
    paper: str
    facts: Facts
    origin: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What ``make`` gives."""
        return self.make(*args, **kwargs)

    @property
    def defaults(self) -> dict[str, Any]:
        """Keyword arguments of ``make`` that have a default, in order."""
        parameters = inspect.signature(self.make).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


class Registry(Mapping[str, Entry[Facts]]):
    """An ordered mapping from name to `Entry`; an unknown name raises a UserError with the nearest spelling.

    ``facts``: the record class of the rows' facts, each of which has a default.

    >>> @dataclass(frozen=True)
    ... class Light:
    ...     warm: bool = False
    >>> colours = Registry("colour", Light)
    >>> _ = colours.add("red", lambda depth=1: depth, "like fire", warm=True)
    >>> colours["red"].defaults, colours["red"](), colours["red"].facts.warm
    ({'depth': 1}, 1, True)
    """

    @overload
    def __init__(self: Registry[NoFacts], kind: str) -> None: ...

    @overload
    def __init__(self, kind: str, facts: Callable[..., Facts]) -> None: ...

    def __init__(self, kind: str, facts: Callable[..., Any] = NoFacts) -> None:
        self.kind = kind
        self._facts = facts
        self._entries: dict[str, Entry[Facts]] = {}

    def add(
        self,
        name: str,
        make: Callable[..., Any],
        summary: str,
        paper: str = "",
        *,
        origin: str | None = None,
        **facts: Any,
    ) -> Entry[Facts]:
        """Register ``make`` under ``name``. A name can be taken once.

        ``facts``: the fields that are not at default. ``origin``: the module that adds the row, where it is not
        ``make``'s.
        """
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice, first by {self._entries[name].origin}")
        module = origin or str(getattr(make, "__module__", extensions.GROUP))  # a partial has none
        found = extensions.origin_of(module)
        entry = self._entries[name] = Entry(name, make, summary, paper, self._facts(**facts), found)
        return entry

    def __getitem__(self, name: str) -> Entry[Facts]:
        if name not in self:
            raise unknown(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        if name not in self._entries and isinstance(name, str):
            extensions.load()  # only what is not built in costs a look at the installed packages
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def shown(value: Any) -> Any:
    """A default as data that can be written down: a function by its name.

    >>> shown(0.05), shown(shown), shown((1, 2))
    (0.05, 'shown', '(1, 2)')
    """
    if isinstance(value, str | int | float | bool | None):
        return value
    return getattr(value, "__name__", None) or repr(value)
