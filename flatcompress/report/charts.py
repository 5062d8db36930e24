"""Small charts as inline SVG that stretch to any width; their labels are HTML, so the type never stretches along.

Every chart is an SVG of 1000 x 1000 units with ``preserveAspectRatio="none"``; strokes do not scale. What the hover
script shows travels in one ``data-tip`` attribute as JSON. All text goes through markupsafe.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from flatcompress.report.numbers import count, percent, significant

MAX_POINTS = 400
SIDE = 1000.0
LARGEST = 1e300  # beyond it ticks are no floats: what is larger is drawn there; logarithms begin at its reciprocal


UNITS: dict[str, tuple[Callable[[Any], str], Callable[[float], str]]] = {
    "number": (significant, lambda t: f"{t:.6g}"),
    "share": (percent, lambda t: f"{100 * t:.4g} %"),
    "count": (count, lambda t: count(t).replace(".0 ", " ")),
}


@dataclass
class Series:
    """One line: ``colour`` is the number of a CSS class, None in ``values`` a gap."""

    name: str
    colour: int
    values: list[float | None]
    style: str = ""  # "thin" | "dashed" | ""


@dataclass
class Axis:
    """The shared x axis: positions, what the hover says at each, stage bands and where lines break."""

    x: list[float]
    labels: list[str]
    bands: list[tuple[float, float, str]] = field(default_factory=list)
    breaks: set[int] = field(default_factory=set)
    ticks: list[tuple[float, str]] = field(default_factory=list)
    pad: float = 0.0
    unit: str = ""


def line_chart(
    title: str,
    axis: Axis,
    series: Sequence[Series],
    *,
    unit: str = "number",
    log: bool = False,
    zero: bool = False,
    dots: bool = False,
    note: str = "",
) -> Markup:
    """A figure with one or more lines; empty when no series has a number.

    ``unit`` ("number", "share" or "count") says how values are written, ``log`` makes the y axis logarithmic (when
    every value is positive), ``zero`` starts it at 0, ``dots`` marks each point.
    """
    show, tick = UNITS[unit]
    series = [s for s in series if any(v is not None for v in s.values)]
    if not series:
        return Markup("")
    axis, series = _thinned(axis, series)
    numbers = [v for s in series for v in s.values if v is not None]
    scale = _Scale(min(numbers), max(numbers), log and min(numbers) > 0, zero)
    xs = _positions(axis)
    parts = [_line("grid", 0, y, SIDE, y) for y in (scale.y(t) for t in scale.ticks)]
    parts += [_line("divide", x, 0, x, SIDE) for x in _dividers(axis)]
    parts += [_path(s, xs, scale, axis.breaks, dots) for s in series]
    labels = [
        Markup('<span class="yt" style="top:{}%">{}</span>').format(_n(scale.y(t) / 10), tick(t)) for t in scale.ticks
    ]
    labels += [_band(axis, a, b, name) for a, b, name in axis.bands]
    labels += [_x_tick(axis, x, name) for x, name in axis.ticks]
    labels += [Markup('<span class="xu">{}</span>').format(axis.unit)] if axis.unit else []
    tip = {"x": [round(x / 10, 2) for x in xs], "l": axis.labels, "s": [_hovered(s, scale, show) for s in series]}
    return Markup(
        '<figure class="chart"><figcaption><b>{title}</b>{note}{legend}</figcaption>'
        '<div class="plot{ticks}" role="img" aria-label="{label}" data-tip="{tip}">'
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{parts}</svg>{labels}</div>'
        "</figure>"
    ).format(
        title=title,
        note=Markup(' <span class="note">{}</span>').format(note) if note else "",
        legend=_legend(series, show),
        ticks="".join(c for c, there in ((" ticked", axis.ticks), (" banded", axis.bands)) if there),
        label=f"{title}: " + "; ".join(f"{s.name} ends at {show(_last(s.values))}" for s in series[:8]),
        tip=json.dumps(tip, separators=(",", ":")),
        parts=Markup("").join(parts),
        labels=Markup("").join(labels),
    )


def _hovered(s: Series, scale: _Scale, show: Callable[[float], str]) -> dict[str, Any]:
    """What the page shows of a line under the pointer: name, colour, heights in percent, values as text."""
    return {
        "n": s.name,
        "c": s.colour,
        "y": [None if v is None else round(scale.y(v) / 10, 1) for v in s.values],
        "v": [None if v is None else show(v) for v in s.values],
    }


def heat_row(levels: Sequence[float | None], marked: Sequence[float | None]) -> Markup:
    """One row of a heat map: a shade per column (0..1), and a mark along the bottom where ``marked`` is above 0."""
    n = max(len(levels), 1)
    parts = [_cells("heat", levels, n, 0, SIDE), _cells("mark", [m or None for m in marked], n, 760, 240)]
    return Markup(
        '<svg class="strip" viewBox="0 0 1000 1000" preserveAspectRatio="none" shape-rendering="crispEdges" '
        'aria-hidden="true">{}</svg>'
    ).format(Markup("").join(parts))


def _cells(kind: str, levels: Sequence[float | None], n: int, y: float, height: float) -> Markup:
    steps = [None if v is None else round(8 * min(1.0, max(0.0, v))) for v in levels]
    parts, start = [], 0
    for i in range(1, len(steps) + 1):
        if i == len(steps) or steps[i] != steps[start]:  # runs of one shade become one rectangle
            if steps[start] is not None:
                parts.append(
                    Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}" opacity="{}"/>').format(
                        kind, _n(SIDE * start / n), _n(y), _n(SIDE * (i - start) / n), _n(height),
                        _n(0.06 + 0.94 * (steps[start] or 0) / 8),
                    )
                )  # fmt: skip
            start = i
    return Markup("").join(parts)


class _Scale:
    """y values to SVG units, with nice ticks."""

    def __init__(self, low: float, high: float, log: bool, zero: bool) -> None:
        self.log = log
        low, high = self._within(low), self._within(high)
        if log:
            self.ticks = _log_ticks(low, high)
        else:
            self.ticks = _linear_ticks(min(low, 0.0) if zero else low, max(high, 0.0) if zero else high)
        self._low, self._high = self._at(self.ticks[0]), self._at(self.ticks[-1])

    def _within(self, value: float) -> float:
        return min(max(value, 1 / LARGEST if self.log else -LARGEST), LARGEST)

    def _at(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def y(self, value: float) -> float:
        return SIDE * (1 - (self._at(self._within(value)) - self._low) / (self._high - self._low))


def _linear_ticks(low: float, high: float) -> list[float]:
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        pad = abs(high) * 0.1 if abs(high) > 1 / LARGEST else 1.0
        low, high = (0.0 if low == 0 else low - pad), high + pad
    step = _nice((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [0.0 if i == 0 else i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... around the values; whole decades, then fewer of them, where that would be too many."""
    first, last = math.floor(math.log10(low) - 1e-9), math.ceil(math.log10(high) + 1e-9)
    if last - first > 3:
        return [10.0**e for e in range(first, last + 1, math.ceil((last - first) / 6))] + [10.0**last] * (
            (last - first) % math.ceil((last - first) / 6) != 0
        )
    grid = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
    below, above = [t for t in grid if t <= low * 1.000001], [t for t in grid if t >= high * 0.999999]
    bottom, top = below[-1], above[0] if above[0] > below[-1] else next(t for t in above if t > below[-1])
    return [t for t in grid if bottom <= t <= top]


def _nice(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step)) if step > 1e-300 else 1e-300
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * 0.999999)


def _place(axis: Axis, x: float) -> float:
    low, high = min(axis.x) - axis.pad, max(axis.x) + axis.pad
    return SIDE * ((x - low) / (high - low) if high > low else 0.5)


def _positions(axis: Axis) -> list[float]:
    return [_place(axis, x) for x in axis.x]


def _dividers(axis: Axis) -> list[float]:
    return [_place(axis, a) for a, _, _ in axis.bands[1:]]


def _band(axis: Axis, start: float, end: float, name: str) -> Markup:
    left, right = max(0.0, _place(axis, start)), min(SIDE, _place(axis, end))
    return Markup('<span class="band" style="left:{}%;width:{}%">{}</span>').format(
        _n(left / 10), _n((right - left) / 10), name
    )


def _x_tick(axis: Axis, x: float, name: str) -> Markup:
    at = _place(axis, x)
    edge = " first" if at < 1 else " last" if at > SIDE - 1 else ""  # labels at the ends stay inside the plot
    return Markup('<span class="xt{}" style="left:{}%">{}</span>').format(edge, _n(at / 10), name)


def _path(series: Series, xs: list[float], scale: _Scale, breaks: set[int], dots: bool) -> Markup:
    lines, singles, pen = [], [], False
    for i, (x, v) in enumerate(zip(xs, series.values)):
        if v is None:
            pen = False
            continue
        joined = pen and i not in breaks
        lines.append(f"{'L' if joined else 'M'}{_n(x)} {_n(scale.y(v))}")
        follows = i + 1 < len(xs) and i + 1 not in breaks and series.values[i + 1] is not None
        if dots or not (joined or follows):  # a lone point would draw nothing
            singles.append(f"M{_n(x)} {_n(scale.y(v))}h0")
        pen = True
    drawn = Markup('<path class="line c{} {}" d="{}"/>').format(series.colour, series.style, "".join(lines))
    if singles:
        drawn += Markup('<path class="dots c{}" d="{}"/>').format(series.colour, "".join(singles))
    return drawn


def _legend(series: Sequence[Series], show: Callable[[Any], str]) -> Markup:
    if len(series) > 8:
        return Markup("")
    items = [
        Markup('<span class="key c{}{}">{} <i>{}</i></span>').format(
            s.colour, " dashed" if s.style == "dashed" else "", s.name, show(_last(s.values))
        )
        for s in series
    ]
    return Markup('<span class="keys">{}</span>').format(Markup("").join(items))


def _last(values: Sequence[float | None]) -> float | None:
    return next((v for v in reversed(values) if v is not None), None)


def _thinned(axis: Axis, series: Sequence[Series]) -> tuple[Axis, list[Series]]:
    n = len(axis.x)
    if n <= MAX_POINTS:
        return axis, list(series)
    kept = sorted({round(i * (n - 1) / (MAX_POINTS - 1)) for i in range(MAX_POINTS)})
    breaks = {next((j for j, i in enumerate(kept) if i >= b), 0) for b in axis.breaks}
    thin = Axis(
        [axis.x[i] for i in kept], [axis.labels[i] for i in kept], axis.bands, breaks, axis.ticks, axis.pad, axis.unit
    )
    return thin, [Series(s.name, s.colour, [s.values[i] for i in kept], s.style) for s in series]


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<path class="{}" d="M{} {}L{} {}"/>').format(kind, _n(x1), _n(y1), _n(x2), _n(y2))


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
