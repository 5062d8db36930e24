"""Who got how many bits, and how far each layer may move against how far its grid moves it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from flatcompress.report.gather import Run, StageLog
from flatcompress.report.numbers import mapping, number, records, significant, size, text, width_of

MAX_LAYERS = 400
UNITS = {"effective_bits": "bits per weight", "bops": "bit operations"}


def maps(run: Run) -> list[dict[str, Any]]:
    """A part per stage that chose bits or measured the map; what is missing or damaged is left out."""
    return [_part(log) for log in run.stages.values() if log.bits or records(log.flatness.get("layers"))]


def _part(log: StageLog) -> dict[str, Any]:
    rows = records(log.flatness.get("layers"))
    widest = max((number(r.get("strain")) or 0.0 for r in rows), default=0.0)
    return {
        "stage": log.name,
        "auto": _budget(log.bits) if log.bits else "",
        "spread": _spread(mapping(log.bits.get("bits"))),
        "rise": significant(log.flatness.get("rise")),
        "rows": [_row(r, widest) for r in rows[:MAX_LAYERS]],
        "hidden": max(0, len(rows) - MAX_LAYERS),
    }


def _budget(event: dict[str, Any]) -> str:
    unit = text(event.get("unit"), 40)
    if unit == "bytes":
        return size(event.get("budget"))
    return f"{significant(event.get('budget'))} {UNITS.get(unit, unit)}"


def _spread(bits: dict[str, Any]) -> str:
    counted = Counter(b for b in (number(v) for v in bits.values()) if b is not None)
    return ", ".join(f"{n} at {b:.0f} bits" for b, n in sorted(counted.items()))


def _row(entry: dict[str, Any], widest: float) -> dict[str, Any]:
    bits = number(entry.get("bits"))
    return {
        "name": text(entry.get("name"), 120),
        "bits": "" if bits is None else f"W{bits:.0f}",
        "reach": significant(entry.get("reach")),
        "move": significant(entry.get("grid_move")),
        "strain": significant(entry.get("strain")),
        "width": width_of(number(entry.get("strain")), widest),
    }
