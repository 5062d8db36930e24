"""SIGINT and SIGTERM: the first asks for a stop after the present step, the second stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType
from typing import Any

NOTICE = b"\nflatcompress: stopping after this step, to save it. Once more to stop at once.\n"


class StopRequest:
    """Turns the two signals into a flag while it is open; the second raises KeyboardInterrupt wherever the run is.

    Every file is either the old or the new one at any moment, so that does no damage; what was not saved is lost.
    """

    def __init__(self) -> None:
        self.requested = False
        self._old: dict[int, Any] = {}
        self._owner = os.getpid()

    def __enter__(self) -> StopRequest:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        except ValueError:  # not in the main thread: the host program owns the signals
            pass
        return self

    def __exit__(self, *exc: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a data-loading process: its parent decides
            return
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        with contextlib.suppress(OSError):
            os.write(2, NOTICE)  # print() is not safe in a signal handler
