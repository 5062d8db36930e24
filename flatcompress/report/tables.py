"""The report's tables: ledger, layers, corruptions, certificate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flatcompress.report.charts import Axis, Series, line_chart
from flatcompress.report.gather import Run
from flatcompress.report.numbers import (
    count,
    duration,
    factor,
    mapping,
    mean,
    milliseconds,
    number,
    percent,
    points,
    significant,
    size,
    text,
    width_of,
)

MAX_LAYERS = 400
ACCURACIES = (("test", "Test", 1), ("held_out", "Held out", 2), ("corrupted", "Corrupted", 4))


@dataclass(frozen=True)
class Column:
    """A ledger column: how to read, write and compare its value."""

    key: str
    title: str
    show: Callable[[Any], str]
    change: str = "factor"  # "points" | "factor" | "" (a change means nothing)
    better: int = -1  # +1: more is better, -1: less is better, 0: neither


COLUMNS = (
    *(Column(f"accuracy.{key}", title, percent, "points", 1) for key, title, _ in ACCURACIES),
    Column("sharpness", "Sharpness", significant),
    Column("params", "Params", count),
    Column("nonzero", "Non-zero", count),
    Column("macs", "MACs", count),
    Column("bytes", "Size", size),
    Column("latency_ms", "Latency", milliseconds),
    Column("seconds", "Time", duration, ""),
    Column("passes", "Passes", count, ""),
)


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """`COLUMNS`, with the metrics of a task that has more to tell than accuracy: all parts of the one that selects."""
    told = next((row for row in rows if mapping(row.get("metric"))), None)
    if told is None:
        return list(COLUMNS)
    chosen, found = mapping(told["metric"]), []
    for name in list(mapping(told.get("metrics")))[:8]:
        selects = name == chosen.get("name")
        share = bool(chosen.get("share")) if selects else False
        for key, title, _ in ACCURACIES if selects else ACCURACIES[:1]:
            shown = f"{text(name, 24).replace('_', ' ')} {title.lower()}"
            better = (1 if chosen.get("higher") else -1) if selects else 0
            change = "points" if share else "factor"
            found.append(Column(f"metrics.{name}.{key}", shown, percent if share else significant, change, better))
    return [*found, *(column for column in COLUMNS if not column.key.startswith("accuracy."))]


def lookup(row: Mapping[str, Any], key: str) -> Any:
    """``row["a"]["b"]`` of "a.b"; None where there is nothing."""
    value: Any = row
    for part in key.split("."):
        value = mapping(value).get(part)
    return value


def ledger(run: Run) -> dict[str, Any]:
    """Header and rows of the ledger; each cell has a text, the change since the row before, and how good that is."""
    columns = [c for c in columns_of(run.rows) if any(lookup(r, c.key) is not None for r in run.rows)]
    rows = []
    latencies = _float_latencies(run)
    for i, row in enumerate(run.rows):
        before = run.rows[i - 1] if i else {}
        if row.get("stage") == "export":  # a file is not comparable with bare weights
            before = {**before, "bytes": None}
        cells = [_cell(c, lookup(row, c.key), lookup(before, c.key)) for c in columns]
        if number(row.get("latency_ms")) is None and latencies[i] is not None:
            at = next((n for n, c in enumerate(columns) if c.key == "latency_ms"), None)
            if at is not None:
                cells[at] = {"text": milliseconds(latencies[i]), "change": "as a float32 file", "tone": ""}
        rows.append({"stage": text(row.get("stage"), 40), "method": text(row.get("method"), 40), "cells": cells})
    return {"titles": [c.title for c in columns], "rows": rows}


def _float_latencies(run: Run) -> list[float | None]:
    """Per row, how long its float model takes as a file: known of the whole network and of the pruned one."""
    measured = mapping(run.certificate.get("float"))
    whole = number(mapping(measured.get("latency")).get("median_ms"))
    pruned = number(mapping(mapping(measured.get("pruned")).get("latency")).get("median_ms"))
    if not run.rows or whole is None:
        return [None] * len(run.rows)
    last = number(run.rows[-1].get("macs"))
    cut = any(k not in ("quantizers", "") for steps in run.plans.values() for k in steps)
    found = []
    for row, stage in zip(run.rows, [*run.stages, *[""] * len(run.rows)]):
        here = any(k != "quantizers" for k in run.plans.get(stage, []))
        same = number(row.get("macs")) is not None and number(row.get("macs")) == last
        found.append(None if row.get("stage") == "export" else whole if not here else pruned if cut and same else None)
    return found


def _cell(column: Column, value: Any, before: Any) -> dict[str, str]:
    now, then = number(value), number(before)
    change, direction = "", 0.0
    if now is not None and then is not None and column.change:
        direction = now - then
        if column.change == "points":
            change = points(direction)
        elif then > 0:
            change = factor(now / then)
    worth = column.better * direction
    tone = "" if not change or abs(worth) < 5e-4 * (abs(then or 0) or 1) else "good" if worth > 0 else "bad"
    return {"text": column.show(value), "change": change, "tone": tone}


def by_stage(run: Run) -> dict[str, Any]:
    """The two pictures beside the ledger: accuracy by stage, and bars of size by stage."""
    rows = run.rows
    if not rows:
        return {"accuracy": "", "bars": []}
    names = [text(r.get("stage"), 24) for r in rows]
    chosen = mapping(rows[-1].get("metric"))
    metric = f"metrics.{chosen['name']}" if chosen.get("name") else "accuracy"
    axis = Axis(
        [float(i) for i in range(len(rows))],
        [f"{n} · {text(r.get('method'), 24)}" if r.get("method") else n for n, r in zip(names, rows)],
        ticks=[(float(i), n) for i, n in enumerate(names)],
        pad=0.35,
    )
    lines = [Series(t, c, [number(lookup(r, f"{metric}.{k}")) for r in rows]) for k, t, c in ACCURACIES]
    largest = max((number(r.get("bytes")) or 0 for r in rows), default=0)
    bars = [
        {"name": n, "text": size(r.get("bytes")), "width": width_of(number(r.get("bytes")), largest)}
        for n, r in zip(names, rows)
    ]
    return {
        "accuracy": line_chart(
            f"{text(chosen.get('name') or 'accuracy', 24).replace('_', ' ').capitalize()} by stage",
            axis,
            lines,
            unit="share" if chosen.get("share", True) else "number",
            dots=True,
        ),
        "bars": bars if largest else [],
    }


def layers(run: Run) -> dict[str, Any]:
    """The last stage's layers, with widths (0..100) for the bars in the cells, and what pruning had to leave whole."""
    logs = [log for log in run.stages.values() if log.layers]
    if not logs:
        return {"rows": []}
    raw = logs[-1].layers
    known: dict[str, dict[str, Any]] = {}
    for log in logs:  # what the last stage did not measure is still true from the one before
        for entry in log.layers:
            there = {k: v for k, v in entry.items() if v is not None}
            known[text(entry.get("name"), 200)] = known.get(text(entry.get("name"), 200), {}) | there
    rows = [_layer(known[text(entry.get("name"), 200)]) for entry in raw[:MAX_LAYERS]]
    widest = {k: max((r[k] or 0 for r in rows), default=0) for k in ("before", "bytes", "sharpness", "macs")}
    for row in rows:
        row["kept"] = width_of(row["channels"], row["before"])
        row["span"] = width_of(row["before"], widest["before"])
        for key in ("bytes", "sharpness", "macs"):
            row[f"{key}_width"] = width_of(row[key], widest[key])
    return {
        "rows": rows,
        "stage": logs[-1].name,
        "hidden": max(0, len(raw) - MAX_LAYERS),
        "protected": [
            (text(e.get("name"), 120), text(e.get("reason"), 200)) for log in logs for e in log.protected[:99]
        ],
        "has": {k: any(r[k] is not None for r in rows) for k in ("sharpness", "sparsity", "bytes", "macs")},
    }


def _layer(entry: dict[str, Any]) -> dict[str, Any]:
    channels = number(entry.get("channels"))
    before = number(entry.get("channels_before"))
    before = channels if before is None else before
    shown = count(channels) if channels == before else f"{count(channels)} of {count(before)}"
    bits = [number(entry.get(k)) for k in ("weight_bits", "activation_bits")]
    values = {k: number(entry.get(k)) for k in ("bytes", "sharpness", "macs", "sparsity")}
    return {
        "name": text(entry.get("name"), 80),
        "kind": text(entry.get("kind"), 20),
        "channels": channels,
        "before": before,
        "channels_text": shown,
        "bits": [f"{letter}{b:.0f}" if b is not None else "" for letter, b in zip("WA", bits)],
        "float": bits[0] is None,
        "bytes_text": size(values["bytes"]),
        "macs_text": count(values["macs"]),
        "sharpness_text": significant(entry.get("sharpness")),
        "sparsity_text": percent(values["sparsity"], 0),
        **values,
    }


def corruptions(run: Run) -> dict[str, Any]:
    """Accuracy per corruption and severity for the last row that has it, and the change since the first such row."""
    having = [r for r in run.rows if mapping(r.get("corruptions"))]
    if not having:
        return {"rows": []}
    first, last = _by_kind(having[0]), _by_kind(having[-1])
    chosen = mapping(having[-1].get("metric"))
    share, better = chosen.get("share", True) is True, 1 if chosen.get("higher", True) is True else -1

    def show(value: float | None) -> str:
        return percent(value, 0) if share else significant(value)

    severities = sorted({s for kind in last.values() for s in kind}, key=_severity_key)[:10]
    rows = []
    for kind in list(last)[:60]:
        now, then = mean(last[kind].values()), mean(first.get(kind, {}).values())
        change = now - then if len(having) > 1 and now is not None and then is not None else None
        cells = [{"text": show(v), "level": _level(v) if share else 0} for v in map(last[kind].get, severities)]
        tone = "" if change is None or abs(change) < 5e-4 else "good" if change * better > 0 else "bad"
        whole = percent if share else significant
        by = points(change) if share else "" if change is None else f"{change:+.3g}"
        rows.append({"kind": text(kind, 40), "cells": cells, "mean": whole(now), "before": whole(then), "change": by,
                     "tone": tone})  # fmt: skip
    names = [text(having[i].get("stage"), 24) for i in (0, -1)]
    return {"rows": rows, "severities": [text(s, 8) for s in severities], "first": names[0], "last": names[1],
            "compared": len(having) > 1}  # fmt: skip


def _by_kind(row: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    kinds: dict[str, dict[str, float | None]] = {}
    for name, value in row["corruptions"].items():
        kind, _, severity = str(name).rpartition("/")
        kinds.setdefault(kind or severity, {})[severity if kind else ""] = number(value)
    return kinds


def _severity_key(severity: str) -> tuple[int, str]:
    return (int(severity) if severity.isascii() and severity.isdigit() and len(severity) < 9 else 10**9, severity)


def _level(value: float | None) -> int:
    """Shade of an accuracy cell, 0 (at or below one half) to 8 (perfect)."""
    return 0 if value is None else round(8 * min(1.0, max(0.0, (value - 0.5) / 0.5)))
