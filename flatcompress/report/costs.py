"""What stayed float and what it costs, and where the time and the memory went."""

from __future__ import annotations

from typing import Any

from flatcompress.report.gather import Run
from flatcompress.report.numbers import DASH, duration, mapping, number, percent, records, size, text, width_of

MAX_LAYERS = 200


def floats(run: Run) -> dict[str, Any]:
    """The layers of the file that compute in floats: their kernel, and their share of weights, MACs and bytes."""
    part = mapping(run.certificate.get("integer"))
    rows = records(part.get("floats"))
    layers = number(part.get("layers"))
    if layers is None or part.get("holds") is None:
        return {}
    stored = {text(r.get("name"), 200): r for r in records(run.certificate.get("layers"))}
    time = number(part.get("share_of_time"))
    return {
        "rows": [_float_row(r, stored.get(text(r.get("name"), 200), {})) for r in rows[:MAX_LAYERS]],
        "hidden": max(0, len(rows) - MAX_LAYERS),
        "layers": f"{layers:.0f}",
        "count": len(rows),
        "macs": percent(_rest(part.get("share_of_macs"))),
        "weights": percent(_rest(part.get("share_of_weights"))),
        "time": "" if time is None else percent(1 - time, 0),
    }


def _rest(value: Any) -> float | None:
    share = number(value)
    return None if share is None else 1 - share


def _float_row(row: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    bits = number(stored.get("weight_bits"))
    return {
        "name": text(row.get("name"), 120),
        "kernel": text(row.get("kernel"), 40) or DASH,
        "bits": "float" if bits is None else f"W{bits:.0f}",
        "bytes": size(stored.get("bytes")),
        "weights": percent(row.get("share_of_weights")),
        "macs": percent(row.get("share_of_macs")),
    }


def spent(run: Run) -> list[dict[str, Any]]:
    """Per stage, and beside them: parts with their seconds, their sum, and the most memory by the end of a stage."""
    found: list[dict[str, Any]] = []
    told = [(log.name, mapping(log.spent.get("seconds")), log.spent.get("peak_bytes")) for log in run.stages.values()]
    for name, seconds, peak in (*told, ("beside the stages", run.beside, None)):
        parts = {text(k, 60): number(v) for k, v in seconds.items()}
        known = {k: v for k, v in parts.items() if v is not None and v >= 0.05}
        if known:
            found.append({"stage": name, "parts": known, "total": sum(known.values()), "peak": size(peak)})
    longest = max((v for stage in found for v in stage["parts"].values()), default=0.0)
    whole = sum(stage["total"] for stage in found)
    for stage in found:
        stage["rows"] = [
            {"name": k, "text": duration(v), "width": width_of(v, longest)}
            for k, v in sorted(stage["parts"].items(), key=lambda item: -item[1])
        ]
        stage["share"] = percent(stage["total"] / whole, 0)
        stage["total"] = duration(stage["total"])
    return found


def taken(run: Run) -> str:
    """How long the run took, as far as its log says it, else as far as its ledger does, which leaves measuring out."""
    told = [mapping(log.spent.get("seconds")).values() for log in run.stages.values() if log.spent]
    if told and len(told) >= len(run.rows):
        return f"{duration(sum(number(s) or 0 for parts in (*told, run.beside.values()) for s in parts))} in all"
    seconds = [number(row.get("seconds")) for row in run.rows]
    return f"{duration(sum(s or 0 for s in seconds))} without measuring" if any(seconds) else ""
