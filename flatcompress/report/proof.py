"""The certificate as a person reads it: its statements, its sizes, and everything else as nested lists."""

from __future__ import annotations

from typing import Any

from flatcompress.report.numbers import (
    DASH,
    mapping,
    number,
    percent,
    points,
    records,
    significant,
    size,
    text,
    width_of,
)

MAX_ROWS = 400


def checks(certificate: dict[str, Any]) -> list[dict[str, Any]]:
    """What the certificate measured, in sentences; ticked only where the certificate as a whole holds."""
    both, kernels, metric = (mapping(certificate.get(k)) for k in ("parity", "kernels", "metric"))
    found = []
    for key, words in (("optimized", "optimizations on"), ("unoptimized", "optimizations off")):
        part = mapping(both.get(key))
        same, steps = number(part.get("equal_argmax")), number(part.get("largest_error_steps"))
        if same is None and steps is not None:
            found.append((f"No output further than {significant(steps)} output steps", f"from the reference, {words}"))
        if same is not None:
            samples = number(part.get("samples"))
            of = f"{samples:,.0f} samples" if samples is not None else "samples"
            share = f"all {of}" if same == 1 else f"{percent(same, 2)} of {of}"
            error = f" · largest error {significant(steps)} output steps" if steps is not None else ""
            found.append((f"Same class on {share}", f"against the torch reference, {words}{error}"))
    inner, layers = number(kernels.get("integer_layers")), number(kernels.get("layers"))
    if inner is not None and layers is not None:
        said = certificate.get("warnings")
        rest = kernels.get("not_integer")
        if isinstance(said, list) and said:
            found.append(("Not all of it on integers", text(said[0], 400)))
        names = ", ".join(text(n, 60) for n in rest[:6]) if isinstance(rest, list) else ""
        found.append((f"{inner:.0f} of {layers:.0f} layers run as integer kernels", f"not: {names}" if names else ""))
    change = number(metric.get("difference"))
    if change is not None:
        in_percent = metric.get("share", True) is True
        by, value = (points(change) if in_percent else f"{change:+.3g}"), metric.get("onnxruntime")
        title = f"{text(metric.get('name'), 40).replace('_', ' ').capitalize()} differs by {by} from the reference"
        found.append((title, f"{percent(value, 2) if in_percent else significant(value)} through onnxruntime"))
    holds = True if certificate.get("holds") is True else None
    return [{"name": name, "holds": holds, "details": details} for name, details in found]


def tree(value: Any, depth: int = 0) -> list[dict[str, Any]]:
    """Anything as rows of {key, text, children, table} for a nested definition list; bounded in size and depth."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value, 1))
    rows = [_branch(text(key, 80), item, depth) for key, item in items[:200] if item not in ([], {}, "")]
    return sorted(rows, key=lambda row: 2 if row["table"] else 1 if row["children"] else 0)


def _branch(key: str, item: Any, depth: int) -> dict[str, Any]:
    table = _table(item)
    nested = table is None and isinstance(item, (dict, list)) and depth < 4 and not _flat(item)
    shown = ", ".join(plain(i) for i in item[:32]) if _flat(item) else plain(item)
    return {
        "key": humane(key),
        "text": "" if nested or table else shown or DASH,
        "form": _form(item),
        "children": tree(item, depth + 1) if nested else [],
        "table": table,
    }


def _form(item: Any) -> str:
    """CSS class of a value: a hash is monospaced, a sentence is set like one."""
    if not isinstance(item, str):
        return ""
    return "prose" if len(item) > 48 and " " in item else "mono" if len(item) >= 32 and " " not in item else ""


def _table(value: Any) -> dict[str, Any] | None:
    """A list of like objects of scalars (the layers of a certificate) as a table."""
    rows = records(value)
    if len(rows) < 2 or len(rows) != len(value):
        return None
    keys = list(dict.fromkeys(k for r in rows[:MAX_ROWS] for k in r))[:12]
    if any(isinstance(r.get(k), dict) for r in rows for k in keys):
        return None
    cells = [[plain(r.get(k)) if not isinstance(r.get(k), list) else _joined(r[k]) for k in keys] for r in rows]
    return {"titles": [humane(text(k, 40)) for k in keys], "rows": [[c or DASH for c in r] for r in cells[:MAX_ROWS]]}


def _joined(values: list[Any]) -> str:
    return " × ".join(plain(v) for v in values[:8])


def sizes(certificate: dict[str, Any]) -> list[dict[str, str]]:
    """Bars of the file against the float model's own file and against what its weights need in theory."""
    known = {**certificate, **mapping(certificate.get("size"))}
    found = [
        ("float model’s file", float_bytes(certificate)),
        ("this file", number(known.get("bytes"))),
        ("of that, weights", number(known.get("weight_bytes"))),
        ("weights in theory", number(known.get("theoretical_bytes"))),
    ]
    largest = max((v or 0 for _, v in found), default=0)
    bars = [{"name": n, "text": size(v), "width": width_of(v, largest)} for n, v in found if v is not None]
    return bars if len(bars) > 1 else []


def float_bytes(certificate: dict[str, Any]) -> float | None:
    """Bytes of the uncompressed model's own ONNX file, where the export measured it."""
    found = number(mapping(certificate.get("float")).get("bytes"))
    return number(certificate.get("float_bytes")) if found is None else found


def _flat(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(i, (dict, list)) for i in value)


def plain(value: Any) -> str:
    """A scalar as text: booleans as yes or no, floats with few digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return significant(value, 4)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else text(value)
    return text(value, 200)


def humane(key: str) -> str:
    """``max_output_error`` as "max output error"."""
    return key.replace("_", " ").strip()
