"""What other packages add: entry points of the group ``flatcompress``, loaded when they are needed.

A distribution names a module (or a function without arguments) under that group, and importing (calling) it registers
whatever it brings, with the decorators of `flatcompress.extend`. Nothing of this is loaded before a name is asked for
that is not built in, or a recipe is read, or everything is listed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import EntryPoint, entry_points

GROUP = "flatcompress"
_loading: ContextVar[str] = ContextVar("loading", default="")
_loaded: set[tuple[str, str]] = set()


def origin_of(module: str) -> str:
    """Where something that ``module`` registers comes from: a distribution, or the module itself."""
    if _loading.get():
        return _loading.get()
    return GROUP if module.split(".")[0] == GROUP else module


def load() -> None:
    """Load every entry point that is not loaded yet. One that fails is left out with a warning that names it."""
    if _loading.get():  # an extension that asks for a name while it is loaded
        return
    for point in entry_points(group=GROUP):
        if (point.name, point.value) in _loaded:
            continue
        _loaded.add((point.name, point.value))
        with _from(point):
            _load(point)


def _load(point: EntryPoint) -> None:
    try:
        found = point.load()
        if callable(found):
            found()
    except Exception as error:  # whatever a stranger's package raises must not stop a run that does not need it
        reason = (str(error).splitlines() or [""])[0]
        warnings.warn(
            f"the extension {point.name!r} of {_name(point)} cannot be loaded and is left out "
            f"({type(error).__name__}: {reason}).",
            stacklevel=4,
        )


@contextmanager
def _from(point: EntryPoint) -> Iterator[None]:
    token = _loading.set(_name(point))
    try:
        yield
    finally:
        _loading.reset(token)


def _name(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value
