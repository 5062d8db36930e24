"""What the networks of a run said of each sample: confusion, classes, and float against file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from flatcompress.report.gather import Run
from flatcompress.report.numbers import count, mapping, number, percent, points, text

MOST_CLASSES = 20  # of a confusion matrix; with more, the pairs that are confused most are listed
MOST_ROWS = 200
MOST_PAIRS = 25
PARTS = {"test": "test", "held_out": "held-out"}


@dataclass
class Said:
    """The predictions of one network on one part. ``counts``: (label, predicted) -> samples."""

    samples: int = 0
    counts: Counter[tuple[int, int]] = field(default_factory=Counter)
    labels: list[int] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)

    def of_class(self, label: int) -> tuple[int, int, int]:
        """Samples of the class, of those the right ones, and how often it was said."""
        support = sum(n for (a, _), n in self.counts.items() if a == label)
        said = sum(n for (_, b), n in self.counts.items() if b == label)
        return support, self.counts[label, label], said


def _whole(value: Any) -> int | None:
    found = number(value)
    return int(found) if found is not None and 0 <= found < 10**9 and found == int(found) else None


def read(raw: Any) -> Said | None:
    """A part of a "predictions" event; None where it is not one."""
    raw = mapping(raw)
    said = Said()
    listed = raw.get("counts")
    for row in listed if isinstance(listed, list) else []:
        cells = [_whole(v) for v in row] if isinstance(row, list) and len(row) == 3 else []
        if len(cells) != 3 or None in cells:
            return None
        said.counts[cells[0], cells[1]] += cells[2] or 0  # type: ignore[index]
    columns = [raw.get(k) for k in ("labels", "predicted", "confidence")]
    if not said.counts or not all(isinstance(c, list) for c in columns):
        return None
    for label, predicted, confidence in zip(*columns):  # type: ignore[arg-type]
        a, b, sure = _whole(label), _whole(predicted), number(confidence)
        if a is None or b is None or sure is None:
            return None
        said.labels.append(a)
        said.predicted.append(b)
        said.confidence.append(sure / 1000)
    said.samples = sum(said.counts.values())
    return said


@dataclass
class Network:
    """A network of the run and what it said, by part."""

    name: str
    parts: dict[str, Said]


def _network(name: str, event: dict[str, Any]) -> Network | None:
    parts = {str(k): found for k, v in mapping(event.get("parts")).items() if (found := read(v)) is not None}
    return Network(name, parts) if parts else None


def last(run: Run) -> Network | None:
    """The last network that was asked: the exported file, where there is one."""
    found = [n for log in run.stages.values() if (n := _network(log.name, log.predictions)) is not None]
    return found[-1] if found else None


def float_network(run: Run) -> Network | None:
    """The last network before anything was quantized, or the float model that the recipe started from."""
    before = None
    for log in run.stages.values():
        given = _network("float model", log.float_predictions)
        if given is not None:
            return given
        if log.name.split("-", 1)[-1].startswith(("quantize", "export")):
            break
        before = _network(log.name, log.predictions) or before
    return before


def class_names(run: Run) -> list[str]:
    """The names of the classes; empty where the log has none."""
    listed = run.start.get("classes")
    return [text(c, 60) for c in listed[:100_000]] if isinstance(listed, list) else []


def class_name(names: list[str], label: int) -> str:
    """A class as it is called, else by its number."""
    return names[label] if 0 <= label < len(names) else str(label)


def sections(run: Run) -> list[dict[str, Any]]:
    """Per part (test, held-out): the confusion matrix or the most confused pairs, the classes, float against file."""
    final, before = last(run), float_network(run)
    if final is None:
        return []
    names = class_names(run)
    found = []
    for part, title in PARTS.items():
        said = final.parts.get(part)
        if said is None:
            continue
        base = before.parts.get(part) if before is not None and before.name != final.name else None
        labels = sorted({a for a, _ in said.counts} | {b for _, b in said.counts})
        found.append(
            {
                "part": title,
                "samples": count(said.samples),
                "network": final.name,
                "float": before.name if base is not None and before is not None else "",
                "matrix": _matrix(said, labels, names) if len(labels) <= MOST_CLASSES else [],
                "titles": [class_name(names, label) for label in labels],
                "pairs": _pairs(said, names),
                "classes": [_class(said, base, label, names) for label in labels[:MOST_ROWS]],
                "hidden": max(0, len(labels) - MOST_ROWS),
                "flips": _flips(base, said) if base is not None else [],
            }
        )
    return found


def _matrix(said: Said, labels: list[int], names: list[str]) -> list[dict[str, Any]]:
    rows = []
    for label in labels:
        support = said.of_class(label)[0]
        cells = []
        for predicted in labels:
            n = said.counts[label, predicted]
            share = n / support if support else 0.0
            cells.append(
                {
                    "text": f"{n:,}" if n else "",
                    "tone": "hit" if label == predicted else "miss",
                    "level": 0 if not n else max(1, round(8 * share)),
                    "title": f"{class_name(names, label)} taken for {class_name(names, predicted)}: "
                    f"{n:,} of {support:,} ({percent(share)})",
                }
            )
        rows.append({"name": class_name(names, label), "cells": cells})
    return rows


def _pairs(said: Said, names: list[str]) -> list[dict[str, str]]:
    wrong = sorted(((n, a, b) for (a, b), n in said.counts.items() if a != b), key=lambda r: (-r[0], r[1], r[2]))
    return [
        {
            "label": class_name(names, a),
            "predicted": class_name(names, b),
            "n": f"{n:,}",
            "share": percent(n / said.of_class(a)[0]),
        }
        for n, a, b in wrong[:MOST_PAIRS]
    ]


def _class(said: Said, base: Said | None, label: int, names: list[str]) -> dict[str, Any]:
    support, hits, told = said.of_class(label)
    recall = hits / support if support else None
    precision = hits / told if told else None
    harmonic = 2 * hits / (support + told) if support + told else None
    then = None
    if base is not None and (of := base.of_class(label))[0]:
        then = of[1] / of[0]
    change = recall - then if recall is not None and then is not None else None
    tone = "" if change is None or abs(change) < 5e-4 else "good" if change > 0 else "bad"
    return {
        "name": class_name(names, label), "support": f"{support:,}", "recall": percent(recall),
        "precision": percent(precision), "f1": percent(harmonic), "float": percent(then),
        "change": points(change), "tone": tone,
    }  # fmt: skip


def _flips(base: Said, said: Said) -> list[tuple[str, str]]:
    """How float and file agree, on the samples that are listed of both."""
    if base.labels != said.labels:
        return []
    kinds: Counter[tuple[bool, bool]] = Counter()
    for label, then, now in zip(said.labels, base.predicted, said.predicted):
        kinds[then == label, now == label] += 1
    words = {
        (True, True): "both right",
        (True, False): "right in float, wrong in the file",
        (False, True): "wrong in float, right in the file",
        (False, False): "both wrong",
    }
    return [(what, f"{kinds[key]:,}") for key, what in words.items()]
