"""What is only reported: a measurement that fails is said, and costs its own number, never the run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

from flatcompress.errors import Interrupted
from flatcompress.training import memory

T = TypeVar("T")


def reported(
    problem: str, measure: Callable[[], T], otherwise: T, hint: str = "", fatal: tuple[type[Exception], ...] = ()
) -> T:
    """``measure()``, or ``otherwise`` with a warning where it fails for any reason but the ``fatal`` ones.

    ``problem`` begins the warning ("the sharpness could not be measured"), ``hint`` is a sentence at its end.
    """
    try:
        return measure()
    except Exception as error:
        if isinstance(error, (Interrupted, *fatal)):
            raise
        said = str(error).strip().splitlines() or [type(error).__name__]
        reason = "not enough memory" if memory.is_out_of_memory(error) else said[0][:200]
        warnings.warn(f"{problem}: {reason.rstrip('.')}.{hint}", stacklevel=2)
        return otherwise
