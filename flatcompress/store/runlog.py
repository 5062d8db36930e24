"""The run's log: `log.jsonl`, one event a line, only ever appended to.

An event is a JSON object with "event" (run, stage, epoch, prune, layers, predictions, spent, warning, done ...) and
"time" (ISO, UTC). Every line is one write to the file, so a killed process tears at most the last line; whoever opens
the log next cuts the torn line off and says so. Trackers (TensorBoard, MLflow, W&B) read the very same events.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from flatcompress.errors import UserError
from flatcompress.storage import plain, to_json, write_error

MAX_LINE = 8 << 20  # a line longer than this is not ours
_LOG_KEPT = "The log up to here and all finished checkpoints are kept."


class Tracker(Protocol):
    """Something else that wants the events as they happen."""

    def event(self, event: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """Append events to ``path``; usable as a context manager.

    Opening cuts a torn last line off and logs a warning event that says how many bytes were lost. RunError when the
    file cannot be written. A tracker that fails is dropped with a warning: it must never cost a run.
    """

    def __init__(self, path: str | Path, trackers: Sequence[Tracker] = ()) -> None:
        self.path = Path(path)
        self.trackers = list(trackers)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
            torn = self._cut_torn_line()
        except OSError as error:
            raise write_error(self.path, error, _LOG_KEPT) from error
        if torn:
            self.event("warning", message=f"the log's last line was torn by an interruption; {torn} bytes were cut off")

    def event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Append one event and return it as it was written. RunError when the disk refuses it."""
        event = plain({"event": kind, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields})
        line = (to_json(event) + "\n").encode("utf-8", "backslashreplace")
        try:
            start = os.fstat(self._file).st_size
            written = 0
            try:
                while written < len(line):
                    written += os.write(self._file, line[written:])
            except OSError:
                os.ftruncate(self._file, start)  # half a line must not swallow the next event
                raise
        except OSError as error:
            raise write_error(self.path, error, _LOG_KEPT) from error
        for tracker in list(self.trackers):
            self._track(tracker, event)
        return event

    def close(self) -> None:
        """Make the log durable and close the trackers. Harmless when called twice."""
        if self._file < 0:
            return
        try:
            os.fsync(self._file)
        except OSError as error:
            warnings.warn(f"{self.path}: could not be made durable ({error}).", stacklevel=2)
        os.close(self._file)
        self._file = -1
        for tracker in self.trackers:
            try:
                tracker.close()
            except Exception as error:
                warnings.warn(f"{type(tracker).__name__} did not close ({error}).", stacklevel=2)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _track(self, tracker: Tracker, event: dict[str, Any]) -> None:
        try:
            tracker.event(event)
        except Exception as error:
            self.trackers.remove(tracker)
            warnings.warn(f"{type(tracker).__name__} failed and is off for this run ({error}).", stacklevel=3)

    def _cut_torn_line(self) -> int:
        size = end = os.fstat(self._file).st_size
        while end > 0:
            start = max(0, end - (1 << 16))
            os.lseek(self._file, start, os.SEEK_SET)
            newline = os.read(self._file, end - start).rfind(b"\n")
            end = start + newline + 1 if newline >= 0 else start
            if newline >= 0:
                break
        if end < size:
            os.ftruncate(self._file, end)
        return size - end


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """The events of a log, oldest first; empty when there is no log yet.

    Torn or foreign lines are left out with one warning that counts them. UserError when the file cannot be read.
    """
    path = Path(path)
    if not path.exists():
        return []
    if not path.is_file():
        raise UserError(f"{path}: not a plain file.")
    events, bad = [], 0
    try:
        with open(path, "rb") as file:
            for line in _lines(file):
                event = _parse(line)
                if event is None:
                    bad += 1
                else:
                    events.append(event)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None
    if bad:
        warnings.warn(f"{path}: {bad} unreadable line(s) left out.", stacklevel=2)
    return events


def _lines(file: Any) -> Iterator[bytes]:
    while line := file.readline(MAX_LINE):
        if not line.endswith(b"\n") and len(line) == MAX_LINE:
            while line and not line.endswith(b"\n"):  # skip the rest of the monster
                line = file.readline(MAX_LINE)
            yield b"?"
        elif line.strip():
            yield line


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None
