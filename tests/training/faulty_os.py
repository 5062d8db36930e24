"""A stand-in for the `os` module that fails, or "loses power", at the n-th call that changes the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

CHANGING = ("open", "write", "fsync", "replace", "mkdir", "unlink", "rmdir", "ftruncate")


class PowerCut(BaseException):
    """The process is gone: nothing after this line runs, not even an `except Exception`."""


class FaultyOs:
    """Counts changing calls; at call ``at`` raises OSError(``code``), or PowerCut when ``code`` is None.

    A failing write puts half of its bytes on the disk first. ``after`` makes a PowerCut strike after the call
    instead of before it. Once the power is cut, every later changing call does nothing but raise again.
    """

    def __init__(self, at: int | None = None, code: int | None = None, after: bool = False) -> None:
        self.at, self.code, self.after, self.calls, self.dead = at, code, after, 0, False

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return (lambda *a, **k: self._call(name, real, *a, **k)) if name in CHANGING else real

    def _call(self, name: str, real: Any, *args: Any, **keywords: Any) -> Any:
        if self.dead:
            raise PowerCut
        self.calls += 1
        if name == "fsync":
            real = _nothing
        if self.calls - 1 != self.at:
            return real(*args, **keywords)
        if name == "write" and not self.after:
            real(args[0], bytes(args[1])[: len(args[1]) // 2])
        if self.code is not None:
            raise OSError(self.code, os.strerror(self.code))
        self.dead = True
        if self.after:
            real(*args, **keywords)
        raise PowerCut


def _nothing(*args: Any) -> None:
    """What an fsync changes for a reader in the same boot."""


def outcome(allowed: type[Exception], function: Callable[..., Any], *args: Any) -> str | None:
    """The message of an ``allowed`` error, None when the call went well; any other error goes through."""
    try:
        function(*args)
    except allowed as error:
        return str(error)
    return None
