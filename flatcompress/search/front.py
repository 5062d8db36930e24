"""The front: which fully trained points nothing beats, as table, JSON, plot, and a recipe per point."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flatcompress.recipe import Recipe
from flatcompress.search.halving import fronts
from flatcompress.search.space import Space
from flatcompress.search.spec import Search
from flatcompress.search.study import Measures, Record, point
from flatcompress.storage import write_text_atomic
from flatcompress.sweep.table import STYLE

RULE = (
    "Points were chosen by the objectives, on the data of the search's recipe: its held-out domain and corrupted "
    "images were chosen by. For figures to report, run the recipes on data that the search has not seen."
)
_SHARES = ("robust", "held_out", "corrupted", "test", "val")


@dataclass(frozen=True)
class FrontPoint:
    """A point of the front: the trial's ``number``, what was measured, and the recipe that repeats it."""

    number: int
    measures: Measures
    values: dict[str, Any]
    recipe: Recipe

    @property
    def file(self) -> str:
        """Its recipe, in the search's folder."""
        return f"recipes/trial-{self.number:04d}.yaml"


@dataclass(frozen=True)
class Front:
    """The non-dominated points within the budgets, and every other fully trained one."""

    search: Search
    points: list[FrontPoint]
    others: list[tuple[int, Measures]]
    counts: dict[str, int]

    @classmethod
    def of(cls, search: Search, space: Space, records: Sequence[Record]) -> Front:
        """The front of what ``records`` say, by the first objective from its best point down."""
        top = search.top
        full = [r for r in records if top in r.results]
        judged = [point(search, r.number, r.results[top]) for r in full]
        within = [p for p in judged if not p.violation]
        best = sorted(fronts(within)[0], key=lambda p: (p.values, p.number)) if within else []
        by_number = {r.number: r for r in full}
        points = [
            FrontPoint(p.number, by_number[p.number].results[top], by_number[p.number].values,
                       space.recipe(by_number[p.number].values, "full", f"trial {p.number}"))
            for p in best
        ]  # fmt: skip
        chosen = {p.number for p in best}
        others = [(r.number, r.results[top]) for r in full if r.number not in chosen]
        counts = {"trials": len(records), "failed": sum(r.failed is not None for r in records)}
        counts |= {str(f): sum(i in r.results for r in records) for i, f in enumerate(search.fidelities)}
        return cls(search, points, others, counts)

    @property
    def columns(self) -> list[str]:
        """What the table shows: the objectives, the budgets, then what else was measured."""
        wanted = [
            *self.search.objectives,
            *self.search.budgets,
            "robust",
            "held_out",
            "corrupted",
            "test",
            "bytes",
            "ms",
        ]
        rows = [p.measures for p in self.points] + [m for _, m in self.others]
        return [c for c in dict.fromkeys([*wanted, "latency_ms", "passes"]) if any(r.get(c) is not None for r in rows)]

    def markdown(self) -> str:
        """The table."""
        head = ["trial", *self.columns, "recipe"]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for p in self.points:
            cells = [str(p.number), *[shown(c, p.measures.get(c)) for c in self.columns], p.file]
            lines.append("| " + " | ".join(cells) + " |")
        counted = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        return "\n".join(lines) + f"\n\n{len(self.points)} points on the front ({counted}). {RULE}\n"

    def to_dict(self) -> dict[str, Any]:
        """The front as plain data."""
        points = [
            {"trial": p.number, "measures": p.measures, "values": p.values, "recipe": p.file} for p in self.points
        ]
        others = [{"trial": number, "measures": measures} for number, measures in self.others]
        return {"schema": 1, "search": self.search.name, "objectives": self.search.objectives,
                "budgets": self.search.budgets, "counts": self.counts, "front": points, "others": others,
                "rule": RULE}  # fmt: skip

    def write(self) -> tuple[str, dict[str, Any]]:
        """Write front.md, front.json, front.html and recipes/ into the search's folder; the Markdown and the data."""
        folder, text, data = self.search.folder, self.markdown(), self.to_dict()
        (folder / "recipes").mkdir(parents=True, exist_ok=True)
        for p in self.points:
            recipe = p.recipe.model_copy(update={"name": f"{self.search.name[:80]}-{p.number:04d}"})
            write_text_atomic(folder / p.file, recipe.to_yaml())
        kept = {folder / p.file for p in self.points}
        for path in (folder / "recipes").glob("trial-*.yaml"):
            if path not in kept:
                path.unlink(missing_ok=True)
        write_text_atomic(folder / "front.md", f"# {self.search.name}\n\n{text}")
        write_text_atomic(folder / "front.json", json.dumps(data, indent=1))
        write_text_atomic(folder / "front.html", self.page())
        return text, data

    def page(self) -> str:
        """One HTML file: a plot for every cost, and the table."""
        title = html.escape(self.search.name)
        head = "".join(f"<th>{html.escape(c)}</th>" for c in ["trial", *self.columns])
        body = "".join(
            f"<tr><th>{p.number}</th>" + "".join(f"<td>{shown(c, p.measures.get(c))}</td>" for c in self.columns)
            + "</tr>" for p in self.points
        )  # fmt: skip
        gains = [n for n, d in self.search.objectives.items() if d == "maximize"]
        costs = [n for n, d in self.search.objectives.items() if d == "minimize"]
        plots = "".join(self._plot(gain, cost) for gain in gains[:1] for cost in costs)
        return (
            "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{title}</title><style>{STYLE}.other{{fill:#9aa3ad}}</style><h1>{title}</h1>{plots}"
            f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
            f"<p>{html.escape(RULE)}</p></html>\n"
        )

    def _plot(self, gain: str, cost: str) -> str:
        """Gain over cost: points of the front with their trial's number, the others grey."""
        marks: list[tuple[float | None, float | None, int | None]]
        marks = [(m.get(cost), m.get(gain), None) for _, m in self.others]
        marks += [(p.measures.get(cost), p.measures.get(gain), p.number) for p in self.points]
        known = [(x, y, n) for x, y, n in marks if x is not None and y is not None]
        if not known:
            return ""
        xs, ys = [x for x, _, _ in known], [y for _, y, _ in known]
        dots = []
        for x, y, number in known:
            at, up = 60 + 640 * _share(x, xs), 260 - 230 * _share(y, ys)
            tip = f"<title>{shown(gain, y)} at {shown(cost, x)}</title>"
            dots.append(
                f"<circle class='{'other' if number is None else 'front'}' cx={at:.1f} cy={up:.1f} r=4>{tip}"
                "</circle>" + ("" if number is None else f"<text x={at + 7:.1f} y={up - 5:.1f}>{number}</text>")
            )
        ends = (
            f"<text x=60 y=288>{shown(cost, min(xs))}</text>"
            f"<text x=700 y=288 text-anchor=end>{shown(cost, max(xs))}</text>"
            f"<text x=52 y=264 text-anchor=end>{shown(gain, min(ys))}</text>"
            f"<text x=52 y=34 text-anchor=end>{shown(gain, max(ys))}</text>"
        )
        label = f"{html.escape(gain)} against {html.escape(cost)}"
        return (f"<figure><figcaption>{label} (lower cost to the left)</figcaption><svg viewBox='0 0 760 296' role=img "
                f"aria-label='{label}'>{ends}{''.join(dots)}</svg></figure>")  # fmt: skip


def _share(value: float, values: Sequence[float]) -> float:
    low, high = min(values), max(values)
    return (value - low) / (high - low) if high > low else 0.5


def shown(name: str, value: float | None) -> str:
    """A measure as a person reads it.

    >>> shown("robust", 0.5), shown("bytes", 12345.0), shown("ms", 0.5)
    ('50.0 %', '12,345', '0.5')
    """
    if value is None:
        return ""
    if name in _SHARES and abs(value) <= 1:
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if name in ("bytes", "macs", "params", "passes") else f"{value:.4g}"
