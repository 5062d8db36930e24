"""One table from a sweep: mean and standard deviation over seeds, as Markdown, JSON and HTML."""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flatcompress.storage import write_text_atomic
from flatcompress.sweep.pool import Finished
from flatcompress.sweep.spec import Sweep

RULE = (
    "Every epoch, and every value of a grid, was chosen by validation accuracy on the source domains; the held-out "
    "domain and the corrupted images were never looked at. ± is the standard deviation over seeds, taken of each "
    "seed's mean over held-out domains."
)


@dataclass(frozen=True)
class Value:
    """Mean and sample standard deviation over ``n`` seeds; shares of 1."""

    mean: float
    std: float | None
    n: int

    def text(self) -> str:
        """In percent."""
        spread = f" ± {100 * self.std:.1f}" if self.std is not None else ""
        return f"{100 * self.mean:.1f}{spread}"


@dataclass(frozen=True)
class Row:
    """A method: held-out accuracy by domain and over all, in-domain test, corrupted, and what it took."""

    method: str
    setting: str
    by_domain: dict[str, Value]
    held_out: Value | None
    test: Value | None
    corrupted: Value | None
    validation: Value | None
    epochs: int
    passes: float
    seconds: float
    bytes: float | None
    macs: float | None
    sharpness: float | None

    @property
    def relative(self) -> float | None:
        """R_C: corrupted over clean accuracy. It rises when clean accuracy falls, so it never stands alone."""
        if self.corrupted is None or self.test is None or not self.test.mean:
            return None
        return self.corrupted.mean / self.test.mean


def table(finished: Iterable[Finished]) -> list[Row]:
    """A row per method, in the order in which they come."""
    by_method: dict[str, list[Finished]] = {}
    for one in finished:
        by_method.setdefault(one.run.method, []).append(one)
    return [_row(name, runs) for name, runs in by_method.items()]


def _row(name: str, runs: list[Finished]) -> Row:
    domains = list(dict.fromkeys(r.run.held_out for r in runs if r.run.held_out is not None))
    return Row(
        method=name,
        setting=runs[0].run.setting,
        by_domain={
            d: value
            for d in domains
            if (value := over_seeds([r for r in runs if r.run.held_out == d], "held_out")) is not None
        },
        held_out=over_seeds(runs, "held_out"),
        test=over_seeds(runs, "test"),
        corrupted=over_seeds(runs, "corrupted"),
        validation=_over_seeds(runs, lambda run: run.val_accuracy),
        epochs=sum(entry.config.epochs_planned or 0 for entry in runs[0].run.recipe.stages),
        passes=_mean([sum(row["passes"] or 0 for row in r.rows) for r in runs]) or 0.0,
        seconds=_mean([sum(row["seconds"] or 0 for row in r.rows) for r in runs]) or 0.0,
        bytes=_mean([r.rows[-1].get("bytes") for r in runs]),
        macs=_mean([r.rows[-1].get("macs") for r in runs]),
        sharpness=_mean([r.rows[-1].get("sharpness") for r in runs]),
    )


def over_seeds(runs: Sequence[Finished], metric: str) -> Value | None:
    """Accuracy ``metric`` of the last ledger row: averaged over domains for each seed, then over seeds."""
    return _over_seeds(runs, lambda run: run.rows[-1]["accuracy"][metric])


def _over_seeds(runs: Sequence[Finished], get: Any) -> Value | None:
    by_seed: dict[int, list[float]] = {}
    for run in runs:
        found = get(run)
        if found is not None:
            by_seed.setdefault(run.run.seed, []).append(found)
    means = [statistics.fmean(values) for values in by_seed.values()]
    if not means:
        return None
    return Value(statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else None, len(means))


def paired(a: Sequence[Finished], b: Sequence[Finished], metric: str = "held_out") -> Value | None:
    """Difference a - b of runs that share seed and domain: mean over pairs, standard deviation over seeds."""
    other = {(r.run.seed, r.run.held_out): r for r in b}
    gains: dict[int, list[float]] = {}
    for run in a:
        match = other.get((run.run.seed, run.run.held_out))
        if match is None:
            continue
        x, y = run.rows[-1]["accuracy"][metric], match.rows[-1]["accuracy"][metric]
        if x is not None and y is not None:
            gains.setdefault(run.run.seed, []).append(x - y)
    means = [statistics.fmean(values) for values in gains.values()]
    if not means:
        return None
    return Value(statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else None, len(means))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [float(v) for v in values if v is not None]
    return statistics.fmean(known) if known else None


def columns(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells as text; columns that no row fills are left out."""
    domains = list(dict.fromkeys(d for row in rows for d in row.by_domain))
    overall = "held out"
    if len(domains) == 1:  # one domain is its own mean
        overall, domains = f"held out ({domains[0]})", []
    head = [
        "method",
        *domains,
        overall,
        "in domain",
        "corrupted",
        "R_C",
        "sharpness",
        "MMACs",
        "epochs",
        "passes",
        "seconds",
        "kB",
        "seeds",
    ]
    cells = [
        [
            row.method + (f" ({row.setting})" if row.setting else ""),
            *[_text(row.by_domain.get(d)) for d in domains],
            _text(row.held_out),
            _text(row.test),
            _text(row.corrupted),
            _number(row.relative, ".2f"),
            _number(row.sharpness, ".3f"),
            _number(None if row.macs is None else row.macs / 1e6, ".2f"),
            str(row.epochs),
            f"{row.passes:,.0f}",
            f"{row.seconds:.0f}",
            _number(None if row.bytes is None else row.bytes / 1000, ".1f"),
            "" if row.test is None else str(row.test.n),
        ]
        for row in rows
    ]
    keep = [i for i in range(len(head)) if i == 0 or any(line[i] for line in cells)]
    return [head[i] for i in keep], [[line[i] for i in keep] for line in cells]


def _text(value: Value | None) -> str:
    return "" if value is None else value.text()


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def markdown(rows: Sequence[Row], note: str = RULE) -> str:
    """The table as Markdown, with the selection rule below it."""
    head, cells = columns(rows)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join(lines) + f"\n\n{note}\n"


def write(sweep: Sweep, finished: Sequence[Finished]) -> tuple[str, dict[str, Any]]:
    """Write table.md, table.json and table.html into the sweep's folder; returns the Markdown and the JSON's data."""
    rows = table(finished)
    text = markdown(rows)
    data = {"schema": 1, "sweep": sweep.name, "seeds": sweep.seeds, "rule": RULE, "rows": [asdict(r) for r in rows]}
    data["runs"] = [
        {"method": f.run.method, "setting": f.run.setting, "held_out": f.run.held_out, "seed": f.run.seed,
         "folder": f.folder.name, "val_accuracy": f.val_accuracy, "ledger": f.rows}
        for f in finished
    ]  # fmt: skip
    sweep.folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(sweep.folder / "table.md", f"# {sweep.name}\n\n{text}")
    write_text_atomic(sweep.folder / "table.json", json.dumps(data, indent=1))
    write_text_atomic(sweep.folder / "table.html", page(sweep.name, rows))
    return text, data


def page(title: str, rows: Sequence[Row]) -> str:
    """One HTML file: the table, and held-out and corrupted accuracy as dots with their deviation."""
    head, cells = columns(rows)
    body = "".join(
        "<tr>" + "".join(f"<t{'h' if i == 0 else 'd'}>{html.escape(c)}</t{'h' if i == 0 else 'd'}>"
                         for i, c in enumerate(line)) + "</tr>"
        for line in cells
    )  # fmt: skip
    plots = "".join(
        plot(name, [(row.method, getattr(row, key)) for row in rows])
        for name, key in (("held-out domain", "held_out"), ("in domain", "test"), ("corrupted", "corrupted"))
        if any(getattr(row, key) is not None for row in rows)
    )
    header = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>{plots}"
        f"<div class=scroll><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
        f"<p>{html.escape(RULE)}</p></html>\n"
    )


def plot(title: str, points: Sequence[tuple[str, Value | None]]) -> str:
    """Accuracy per method: a dot at the mean, a bar over one standard deviation to each side."""
    known = [(name, v) for name, v in points if v is not None]
    low = min(v.mean - (v.std or 0.0) for _, v in known)
    high = max(v.mean + (v.std or 0.0) for _, v in known)
    pad = 0.05 * (high - low) or 0.01
    low, high = low - pad, high + pad
    lines = []
    for i, (name, v) in enumerate(known):
        y, x, spread = 24 * i + 20, _at(v.mean, low, high), (v.std or 0.0) / (high - low) * 400
        lines.append(
            f"<text x=230 y={y + 4} text-anchor=end>{html.escape(name)}</text>"
            f"<line x1={x - spread:.1f} x2={x + spread:.1f} y1={y} y2={y}></line>"
            f"<circle cx={x:.1f} cy={y} r=4></circle>"
            f"<text x=660 y={y + 4}>{v.text()}</text>"
        )
    height = 24 * len(known) + 14
    return (
        f"<figure><figcaption>{html.escape(title)} accuracy, %</figcaption>"
        f"<svg viewBox='0 0 760 {height}' role=img aria-label='{html.escape(title)}'>{''.join(lines)}</svg></figure>"
    )


def _at(value: float, low: float, high: float) -> float:
    return 245 + 400 * (value - low) / (high - low)


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#1c2024;"
    "background:#fff}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:.3rem .7rem;text-align:right;"
    "border-bottom:1px solid #ddd}th:first-child{text-align:left}.scroll{overflow-x:auto}figure{margin:1rem 0}"
    "svg{width:100%;font-size:12px}circle{fill:#0b63ce}line{stroke:#0b63ce;stroke-width:2}"
    "@media(prefers-color-scheme:dark){body{color:#e6e6e6;background:#16181a}svg text{fill:#e6e6e6}"
    "th,td{border-color:#444}}"
)
