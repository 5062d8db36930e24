"""How much is left after each prune event."""

from __future__ import annotations

from collections.abc import Callable

from flatcompress.errors import UserError
from flatcompress.registry import Registry

SCHEDULES = Registry("schedule")


def exponential(start: float, end: float, done: float) -> float:
    """start^(1-t) * end^t at t = done in [0, 1]: every event removes the same share (arXiv 2006.09081).

    >>> [round(exponential(100, 20, r / 4), 3) for r in range(5)]
    [100.0, 66.874, 44.721, 29.907, 20.0]
    """
    return start ** (1 - done) * end**done


def cubic(start: float, end: float, done: float) -> float:
    """end + (start - end) * (1 - t)^3: fast first, slow at the end (arXiv 1710.01878, eq. 1, on what is kept).

    >>> [round(1 - cubic(1.0, 0.2, r / 4), 4) for r in range(5)]
    [0.0, 0.4625, 0.7, 0.7875, 0.8]
    """
    return end + (start - end) * (1 - done) ** 3


def one_shot(start: float, end: float, done: float) -> float:
    """Everything at the first event."""
    return end if done > 0 else start


SCHEDULES.add("exponential", exponential, "the same share at every event", "2006.09081")
SCHEDULES.add("cubic", cubic, "much first, little at the end", "1710.01878")
SCHEDULES.add("one_shot", one_shot, "all at the first event")


def left_after(kind: str, start: float, end: float, event: int, events: int) -> float:
    """What is to be left after prune event ``event`` of ``events`` (event 0: nothing cut yet)."""
    if events < 1:
        raise UserError(f"a schedule needs at least one prune event, found {events}.")
    curve: Callable[[float, float, float], float] = SCHEDULES[kind]
    return curve(start, end, min(event, events) / events)
