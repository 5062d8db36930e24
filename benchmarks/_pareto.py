"""Two-dimensional Pareto fronts and hypervolumes, and a plot of them: cost (bytes, milliseconds) against gain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]  # (cost, gain): cost is better small, gain is better large


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in one of the two and equals or beats in the other, by rising cost.

    >>> front([(1, 5), (2, 4), (3, 7), (3, 6)])
    [(1, 5), (3, 7)]
    """
    kept: list[Point] = []
    for cost, gain in sorted(set(points), key=lambda p: (p[0], -p[1])):
        if not kept or gain > kept[-1][1]:
            kept.append((cost, gain))
    return kept


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Area between the front and ``reference`` (the cost and gain that count for nothing).

    >>> hypervolume([(1, 5), (3, 7)], (4, 0))
    17.0
    """
    worst, floor = reference
    steps = front([(cost, gain) for cost, gain in points if cost < worst and gain > floor])
    ends = [*[cost for cost, _ in steps[1:]], worst]
    return float(sum((end - cost) * (gain - floor) for (cost, gain), end in zip(steps, ends)))


@dataclass(frozen=True)
class Mark:
    """A labelled point of a plot; ``group`` decides its colour, ``spread`` is drawn up and down."""

    label: str
    group: str
    cost: float
    gain: float
    spread: float = 0.0


COLOURS = ("#1f6fb2", "#d1495b", "#2e933c", "#8a4fbf", "#e08e1b", "#00798c", "#7a5c3e", "#c2378f", "#5f6b76", "#a3a300")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 560, 420, 56, 34, 44


def plot(panels: Sequence[tuple[str, str, Sequence[Mark]]], gain_name: str, groups: Sequence[str]) -> str:
    """An SVG of panels (title, cost name, marks) side by side: logarithmic cost, dashed Pareto front, a legend."""
    colours = {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(groups)}
    legend_rows = math.ceil(len(groups) / 4)
    width, height = WIDTH * len(panels), HEIGHT + 20 * legend_rows + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for i, (title, cost_name, marks) in enumerate(panels):
        parts.append(
            f'<g transform="translate({i * WIDTH} 0)">{_panel(title, cost_name, gain_name, marks, colours)}</g>'
        )
    for i, group in enumerate(groups):
        x, y = LEFT + (i % 4) * (width - LEFT) / 4, HEIGHT + 14 + 20 * (i // 4)
        parts.append(f'<circle cx="{x:.0f}" cy="{y - 4}" r="5" fill="{colours[group]}"/>')
        parts.append(f'<text x="{x + 10:.0f}" y="{y}">{escape(group)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(title: str, cost_name: str, gain_name: str, marks: Sequence[Mark], colours: dict[str, str]) -> str:
    low, high = min(m.cost for m in marks) / 1.15, max(m.cost for m in marks) * 1.15
    bottom = 5 * math.floor(min(m.gain - m.spread for m in marks) / 5)
    top = 5 * math.ceil(max(m.gain + m.spread for m in marks) / 5)
    right, base = WIDTH - 16, HEIGHT - BOTTOM

    def at(cost: float, gain: float) -> Point:
        x = LEFT + (right - LEFT) * math.log(cost / low) / math.log(high / low)
        return x, base - (base - TOP) * (gain - bottom) / (top - bottom)

    parts = [f'<text x="{LEFT}" y="20" font-size="14" font-weight="bold">{escape(title)}</text>']
    for tick in range(bottom, top + 1, 5):
        y = at(low, tick)[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
    for tick in log_ticks(low, high):
        x = at(tick, bottom)[0]
        parts.append(f'<path d="M{x:.1f} {TOP}V{base}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{base + 34}" text-anchor="middle">{escape(cost_name)}</text>')
    turned = f'transform="translate(16 {(TOP + base) / 2}) rotate(-90)"'
    parts.append(f'<text {turned} text-anchor="middle">{escape(gain_name)}</text>')
    steps = [at(*p) for p in front([(m.cost, m.gain) for m in marks])]
    path = "".join(f"H{x:.1f}V{y:.1f}" for x, y in steps)
    parts.append(
        f'<path d="M{steps[0][0]:.1f} {base}{path}H{right}" fill="none" stroke="#999" stroke-dasharray="4 3"/>'
    )
    for m in marks:
        x, y = at(m.cost, m.gain)
        up, down = at(m.cost, m.gain + m.spread)[1], at(m.cost, m.gain - m.spread)[1]
        colour = colours[m.group]
        parts.append(f'<path d="M{x:.1f} {up:.1f}V{down:.1f}" stroke="{colour}" opacity="0.4"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{x + 7:.1f}" y="{y - 5:.1f}" fill="{colour}" font-size="11">{escape(m.label)}</text>')
    return "".join(parts)


def log_ticks(low: float, high: float) -> list[float]:
    """The 1, 2, 5, 10, ... between two positive numbers.

    >>> log_ticks(15, 300)
    [20.0, 50.0, 100.0, 200.0]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    grid = [float(f"{digit}e{power}") for power in range(first, last + 1) for digit in (1, 2, 5)]
    return [tick for tick in grid if low <= tick <= high]
