"""Runs side by side: their figures, curves and layers, and what differs in their recipes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from flatcompress.errors import UserError
from flatcompress.report import proof, tables
from flatcompress.report.charts import Axis, Series, line_chart
from flatcompress.report.gather import Run, gather
from flatcompress.report.numbers import DASH, duration, mapping, number, percent, records, significant, text
from flatcompress.report.page import badge, rendered
from flatcompress.storage import write_text_atomic

MOST_RUNS = 6  # there are six colours
MAX_LAYERS = 400
MAX_KEYS = 200
Row = dict[str, Any]  # {"name", "values", "texts", "best": position of the best one or None}


def compare(folders: Sequence[str | Path]) -> dict[str, Any]:
    """Two to six run folders as plain data.

    Returns {"runs": [{"name", "folder", "verdict"}], "figures": rows, "layers": rows, "recipe": rows}; a row is
    {"name", "values": one a run, "texts"}, of the figures also "best". UserError for a folder that is no
    run, or too many.
    """
    runs, names = _gathered(folders)
    return {
        "runs": [{"name": n, "folder": str(r.path), "verdict": badge(r)["text"]} for n, r in zip(names, runs)],
        "figures": figures(runs),
        "layers": layers(runs),
        "recipe": recipe(runs),
    }


def build(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Write the page of `compare` to ``path``. UserError as there; RunError when the page cannot be written."""
    runs, names = _gathered(folders)
    found = compare(folders)
    page = rendered(
        "compare.html.j2",
        title=" and ".join(names) if len(names) == 2 else f"{len(names)} runs",
        badges=[{"name": n, "path": str(r.path), **badge(r)} for n, r in zip(names, runs)],
        curves=_curves(runs, names),
        contents=[(a, t) for a, t in (("figures", "Figures"), ("curves", "Curves"), ("layers", "Layers"),
                                      ("recipes", "Recipes")) if a == "curves" or found.get(a, found["recipe"])],
        **found,
    )  # fmt: skip
    write_text_atomic(path, page, "Nothing else was touched.")
    return Path(path)


def _gathered(folders: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    if not 2 <= len(folders) <= MOST_RUNS:
        raise UserError(f"{len(folders)} run(s) given: compare takes 2 to {MOST_RUNS} run folders.")
    runs = [gather(folder) for folder in folders]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):  # one recipe, several folders
        names = [text(run.path.resolve().name, 60) for run in runs]
    if len(set(names)) < len(names):
        names = [text(str(run.path), 80) for run in runs]
    return runs, names


def _row(name: str, values: list[Any], show: Callable[[Any], str], better: int = 0) -> Row:
    known = [(better * v, i) for i, v in enumerate(map(number, values)) if v is not None]
    best = max(known)[1] if better and len(known) > 1 and len({v for v, _ in known}) > 1 else None
    return {"name": name, "values": values, "texts": [show(v) for v in values], "best": best}


def figures(runs: Sequence[Run]) -> list[Row]:
    """The last row of each ledger, and what the certificates say; rows that no run has are left out."""
    lasts = [run.rows[-1] if run.rows else {} for run in runs]
    rows = [
        _row(c.title, [tables.lookup(last, c.key) for last in lasts], c.show, c.better)
        for c in tables.COLUMNS
        if c.key not in ("seconds", "passes", "sharpness")
    ]
    sharp = [
        next((v for r in reversed(run.rows) if (v := number(r.get("sharpness"))) is not None), None) for run in runs
    ]
    rows.append(_row("Sharpness before export", sharp, significant, -1))
    for name in dict.fromkeys(text(k, 40) for last in lasts for k in mapping(last.get("metrics"))):
        if name == "accuracy":
            continue
        for part, title, _ in tables.ACCURACIES:
            values = [mapping(mapping(last.get("metrics")).get(name)).get(part) for last in lasts]
            rows.append(_row(f"{name}, {title.lower()}", values, significant))
    floats = [mapping(run.certificate.get("float")) for run in runs]
    rows += [
        _row("Times smaller than float", [f.get("smaller") for f in floats], significant, 1),
        _row("Times faster than float", [f.get("faster") for f in floats], significant, 1),
        _row(
            "MACs on integers", [mapping(r.certificate.get("integer")).get("share_of_macs") for r in runs], percent, 1
        ),
        _row("Bytes of the float model’s file", [proof.float_bytes(r.certificate) for r in runs], tables.size),
        _row("Time of all stages", [_seconds(run) for run in runs], duration, -1),
    ]
    return [row for row in rows if any(v is not None for v in row["values"])]


def _seconds(run: Run) -> float | None:
    known = [s for s in (number(row.get("seconds")) for row in run.rows) if s is not None]
    return sum(known) if known else None


def layers(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per layer, in the order of the runs: channels and bits in each; None where a run has no such layer."""
    known = [{row["name"]: row for row in tables.layers(run)["rows"]} for run in runs]
    names = list(dict.fromkeys(name for found in known for name in found))[:MAX_LAYERS]
    rows = []
    for name in names:
        cells = [_layer(found.get(name)) for found in known]
        shown = {(c["channels"], tuple(c["bits"])) if c else None for c in cells}
        rows.append({"name": name, "cells": cells, "differs": len(shown) > 1})
    return rows


def _layer(row: dict[str, Any] | None) -> dict[str, Any] | None:
    if row is None:
        return None
    keys = ("channels", "channels_text", "before", "bits", "float", "bytes", "bytes_text")
    return {key: row[key] for key in keys}


def recipe(runs: Sequence[Run]) -> list[Row]:
    """The keys whose values are not the same in all recipes, with each one's value.

    A stage that is not in every recipe is one row, without its keys.
    """
    stages = [_stages(run.recipe) for run in runs]
    shared = set(stages[0]).intersection(*stages[1:])
    places: dict[tuple[str, int], int] = {}  # a stage goes by its place in the first recipe that has it
    for found in stages:
        for index, stage in enumerate(found):
            places.setdefault(stage, index)
    flat = []
    for run, found in zip(runs, stages, strict=True):
        there = {f"{places[s]}.{s[0]}": keys if s in shared else "there" for s, keys in found.items()}
        flat.append(dict(_flat({**run.recipe, "stages": there} if there else run.recipe)))
    keys = list(dict.fromkeys(key for values in flat for key in values))
    rows = []
    for key in keys:
        values = [values.get(key) for values in flat]
        if any(v != values[0] for v in values[1:]):
            rows.append({"name": text(key, 120), "values": values, "texts": [_shown(v) for v in values], "best": None})
    return rows[:MAX_KEYS]


def _stages(recipe: dict[str, Any]) -> dict[tuple[str, int], Any]:
    """The keys of a recipe's stages by kind and which one of that kind, in order."""
    found: dict[tuple[str, int], Any] = {}
    for entry in records(recipe.get("stages")):
        for kind, keys in entry.items():
            name = text(kind, 40)
            found[name, sum(name == other for other, _ in found)] = keys
    return found


def _shown(value: Any) -> str:
    return DASH if value is None else text(value, 80) or str(value)[:80]


def _flat(value: Any, path: str = "", depth: int = 0) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value and depth < 8:
        return [pair for k, v in value.items() for pair in _flat(v, f"{path}.{k}" if path else str(k), depth + 1)]
    if isinstance(value, list) and any(isinstance(v, dict) for v in value) and depth < 8:
        return [pair for i, v in enumerate(value) for pair in _flat(v, f"{path}.{i}", depth + 1)]
    return [(path, value)]


def _curves(runs: Sequence[Run], names: list[str]) -> list[Markup]:
    """Validation accuracy and training loss over the epochs of all stages, a line a run."""
    logs = [[e for log in run.stages.values() for e in log.epochs] for run in runs]
    longest = max((len(events) for events in logs), default=0)
    if not longest:
        return []
    every = max(1, round(longest / 12))
    ticks = [(float(i), f"{i + 1}") for i in range(every - 1, longest, every)]

    def chart(title: str, keys: tuple[str, ...], **options: Any) -> Markup:
        axis = Axis([float(i) for i in range(longest)], [f"epoch {i + 1}" for i in range(longest)], ticks=ticks,
                    pad=0.5, unit="epoch")  # fmt: skip
        lines = []
        for colour, (name, events) in enumerate(zip(names, logs), 1):
            values = [next((v for k in keys if (v := number(e.get(k))) is not None), None) for e in events]
            lines.append(Series(name, colour, values + [None] * (longest - len(values))))
        return line_chart(title, axis, lines, **options)

    accuracy = chart("Validation accuracy", ("val_accuracy",), unit="share")
    found = [accuracy or chart("Validation score", ("val_score",)), chart("Training loss", ("loss",), zero=True)]
    return [c for c in found if c]
