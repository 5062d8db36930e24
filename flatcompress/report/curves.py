"""Charts over time: training, pruning, and the conflict of the scale gradients."""

from __future__ import annotations

from statistics import median
from typing import Any

from markupsafe import Markup

from flatcompress.report.charts import Axis, Series, heat_row, line_chart
from flatcompress.report.gather import Run, StageLog
from flatcompress.report.numbers import count, mapping, mean, number, percent, significant, text

MAX_QUANTIZERS = 64
MAX_COLUMNS = 96
MAX_TICKS = 12


def training(run: Run) -> list[Markup]:
    """Loss, accuracy, loss rise at the perturbed point and learning rate over the epochs of all stages in a row."""
    axis, epochs = _epoch_axis([log for log in run.stages.values() if log.epochs])
    if not epochs:
        return []

    def values(key: str) -> list[float | None]:
        return [number(e.get(key)) for e in epochs]

    charts = [
        _metric(axis, epochs),
        line_chart("Loss", axis, [Series("train", 1, values("loss"))], zero=True),
        line_chart("Sharpness while training", axis, [Series("loss rise", 3, values("gap"))], zero=True,
                   note="loss at the perturbed point − loss"),
        line_chart("Learning rate", axis, [Series("lr", 4, values("lr"))], zero=True),
    ]  # fmt: skip
    return [c for c in charts if c]


def _metric(axis: Axis, epochs: list[dict[str, Any]]) -> Markup:
    """What selects the epoch: accuracy, or another task's metric under its name."""
    told = next((e for e in epochs if e.get("metric")), None)
    title = "Accuracy" if told is None else text(told["metric"], 24).replace("_", " ").capitalize()
    keys = ("accuracy", "val_accuracy") if told is None else ("score", "val_score")
    train, validation = ([number(e.get(key)) for e in epochs] for key in keys)
    lines = [Series("train", 6, train, "dashed"), Series("validation", 1, validation)]
    return line_chart(title, axis, lines, unit="share" if told is None or told.get("share") is True else "number")


def _epoch_axis(logs: list[StageLog]) -> tuple[Axis, list[dict[str, Any]]]:
    axis, epochs = Axis([], [], pad=0.5, unit="epoch"), list[dict[str, Any]]()
    every = max(1, round(sum(len(log.epochs) for log in logs) / MAX_TICKS))
    for log in logs:
        start = len(epochs)
        axis.breaks.add(start)
        axis.bands.append((start - 0.5, start + len(log.epochs) - 0.5, _short(log.name)))
        numbers = [number(e.get("epoch")) or 0.0 for e in log.epochs]
        axis.ticks += [(float(start + i), f"{numbers[i]:.0f}") for i in _marked(len(numbers), every)]
        for event in log.epochs:
            total = number(event.get("epochs"))
            of = f" of {total:.0f}" if total else ""
            axis.labels.append(f"{log.name} · epoch {significant(event.get('epoch'))}{of}")
            epochs.append(event)
    axis.x = [float(i) for i in range(len(epochs))]
    return axis, epochs


def _marked(n: int, every: int) -> list[int]:
    """Positions of ``n`` epochs that get a number: the last one, and every so many before it that leave it room."""
    inner = [i for i in range(every - 1, n - 1, every) if n - 1 - i >= every]
    return [*inner, n - 1] if n else []


def pruning(run: Run) -> list[Markup]:
    """Channels kept over the steps of each stage that prunes gradually."""
    charts = []
    for log in run.stages.values():
        events = [e for e in log.prune if number(e.get("kept_channels")) is not None]
        if not events:
            continue
        steps = [number(e.get("step")) or 0.0 for e in events]
        total = max((number(e.get("total_channels")) or 0.0 for e in events), default=0.0)
        kept = Series("kept", 2, [number(e.get("kept_channels")) for e in events])
        axis = Axis(steps, [f"{log.name} · step {s:.0f}" for s in steps], ticks=_step_ticks(steps))
        note = f"of {count(total)}" if total else ""
        charts.append(
            line_chart(f"Channels kept, {log.name}", axis, [kept], unit="count", zero=True, note=note, dots=True)
        )
    return charts


def conflict(run: Run) -> list[dict[str, Any]]:
    """Per stage with conflict events: summary charts, a heat map of disorder with the frozen stretches, s / s0."""
    found = []
    for log in run.stages.values():
        events = [e for e in log.conflict if mapping(e.get("quantizers"))]
        if events:
            found.append(_conflict_of(log.name, events))
    return found


def _conflict_of(stage: str, events: list[dict[str, Any]]) -> dict[str, Any]:
    events = _thin(events)
    names = list(dict.fromkeys(name for e in events for name in e["quantizers"]))
    tracks = {n: [mapping(e["quantizers"].get(n)) for e in events] for n in names}
    steps = [number(e.get("step")) or 0.0 for e in events]
    axis = Axis(steps, [f"step {s:.0f}" for s in steps], ticks=_step_ticks(steps))
    disorder, rate, frozen, ratio = (_matrix(tracks, k) for k in ("disorder", "conflict", "frozen", "scale_ratio"))
    charts = [
        line_chart("Disorder and conflict", axis, [Series("disorder, median", 1, _medians(disorder)),
                   Series("conflict rate, median", 2, _medians(rate))], unit="share", zero=True),
        line_chart("Frozen scales", axis, [Series("share of all", 5, _means(frozen))], unit="share", zero=True),
        line_chart("Scales against their start", axis,
                   [Series(text(n, 60), 1, v, "thin") for n, v in list(ratio.items())[:MAX_QUANTIZERS]],
                   log=True, note="s / s₀, one line a quantizer"),
    ]  # fmt: skip
    rows = [
        {
            "name": text(n, 60),
            "strip": heat_row(disorder[n], frozen[n]),
            "disorder": percent(mean(disorder[n]), 0),
            "conflict": percent(mean(rate[n]), 0),
            "frozen": percent(mean(frozen[n]), 0),
            "ratio": significant(next((v for v in reversed(ratio[n]) if v is not None), None)),
        }
        for n in names[:MAX_QUANTIZERS]
    ]
    return {
        "stage": stage,
        "charts": [c for c in charts if c],
        "rows": rows,
        "hidden": max(0, len(names) - MAX_QUANTIZERS),
        "first": f"{steps[0]:.0f}",
        "last": f"{steps[-1]:.0f}",
    }


def _matrix(tracks: dict[str, list[dict[str, Any]]], key: str) -> dict[str, list[float | None]]:
    def value(entry: dict[str, Any]) -> float | None:
        raw = entry.get(key)
        return float(raw) if isinstance(raw, bool) else number(raw)

    return {name: [value(e) for e in entries] for name, entries in tracks.items()}


def _medians(matrix: dict[str, list[float | None]]) -> list[float | None]:
    columns = [[v for v in column if v is not None] for column in zip(*matrix.values())]
    return [median(c) if c else None for c in columns]


def _means(matrix: dict[str, list[float | None]]) -> list[float | None]:
    return [mean(column) for column in zip(*matrix.values())]


def _thin(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    n = len(events)
    if n <= MAX_COLUMNS:
        return events
    return [events[round(i * (n - 1) / (MAX_COLUMNS - 1))] for i in range(MAX_COLUMNS)]


def _step_ticks(steps: list[float]) -> list[tuple[float, str]]:
    if steps[0] == steps[-1]:
        return [(steps[0], f"step {steps[0]:.0f}")]
    return [(steps[0], f"step {steps[0]:.0f}"), (steps[-1], f"{steps[-1]:,.0f}")]


def _short(stage: str) -> str:
    return stage.split("-", 1)[-1]
