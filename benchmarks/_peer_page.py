"""The page of `benchmarks.peers`: table, verdicts, hypervolumes, plot, and what the raw figures were."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import _common, _negative, _pareto, _peer_envs, _sweeps
from benchmarks._peer_rows import HEADLINE, OURS, Peer, lines
from flatcompress.sweep.table import Value

SAME = 1.03  # latencies up to 3 % apart are equal
CHANCE = 1 / 12
METRICS = ("test", "held_out", "corrupted", "robust")
Found = Mapping[int, Mapping[str, Mapping[str, Any]]]  # seed -> row -> figures

INTRO = """
Accuracy in percent on 12 drawn classes; three styles are trained on. *corrupted*: mean over kinds and severities of
in-domain test images; *held out*: the style *sketch*, which no training image had; *robust*: the mean of the two. One
float network per seed (ERM, {start} epochs) is the start of every row but those "from scratch", whose own first {start}
epochs stand in its place; from there everybody gets {epochs} epochs of the same images (pruning and QAT share them),
unless the row says twice, and chooses its epoch by validation on the source styles. No peer saw an image that is
graded: each wrote an ONNX file, and accuracy, bytes and milliseconds (onnxruntime's CPU provider, batch 1, 1 thread,
interleaved medians of CPU time) were measured afterwards for all of them alike. *passes*: forward and backward passes
with those of the start; *seconds*: CPU seconds with those of the start, export included. *lines*: what a user of the
library writes, imports and training loop included, data and network not (`benchmarks/peer_scripts`).
"""

READING = """
How to read it: the images are drawn, the network has 78 k parameters, and differences of a point are within the
spread of the seeds. So small a network gains little from integers in milliseconds. Flat methods take two passes a
step; the rows with twice the epochs have as many passes as they. NNCF's and torchao's files are written for other
runtimes (OpenVINO; Inductor and ExecuTorch): their latency in onnxruntime is what an onnxruntime user gets, not what
they were made for. Peers were run as their documentation shows, with the learning rate, schedule and batch size of
flatcompress's own stages. SAM's radius is the one that validation chose for flatcompress's float training (0.4; the
library's default is 0.05), Torch-Pruning's optimizer was chosen by validation on the first seed; nothing of
flatcompress's was tuned here.
"""


@dataclass(frozen=True)
class Summary:
    """A row over its seeds. ``problem`` stands for figures that are not there."""

    number: int
    peer: Peer
    lines: int
    accuracy: dict[str, Value]
    figures: dict[str, float]  # means of bytes, ms, seconds, passes
    by_seed: dict[int, float]  # robust accuracy
    problem: str = ""


def robust(figures: Mapping[str, Any]) -> float:
    """Mean of corrupted and held-out accuracy."""
    return (figures["corrupted"] + figures["held_out"]) / 2


def value(numbers: Sequence[float]) -> Value:
    """Mean and sample standard deviation."""
    return Value(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None, len(numbers))


def summaries(rows: Sequence[Peer], found: Found) -> list[Summary]:
    """A summary per row that was run at all."""
    made = []
    for peer in rows:
        seeds = {seed: by_row[peer.name] for seed, by_row in found.items() if peer.name in by_row}
        good = {seed: {**f, "robust": robust(f)} for seed, f in seeds.items() if "problem" not in f}
        problem = next((f["problem"] for f in seeds.values() if "problem" in f), "")
        if not seeds:
            continue
        made.append(
            Summary(
                number=len(made) + 1,
                peer=peer,
                lines=lines(peer, rows),
                accuracy={m: value([f[m] for f in good.values()]) for m in METRICS} if good else {},
                figures={k: statistics.fmean(f[k] for f in good.values()) for k in ("bytes", "ms", "seconds", "passes")}
                if good
                else {},
                by_seed={seed: f["robust"] for seed, f in good.items()},
                problem=problem,
            )
        )
    return made


@dataclass(frozen=True)
class Verdict:
    """``ours`` against ``peer``: the paired gain in robust accuracy, and what of bytes and latency is not smaller."""

    ours: Summary
    peer: Summary
    gain: Value
    larger: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """More robust, at no more bytes and no more milliseconds."""
        return self.gain.mean > 0 and not self.larger

    def text(self) -> str:
        """One sentence, as the other pages have it."""
        error = _sweeps.standard_error(self.gain)
        spread = f"standard error {100 * error:.1f}, {self.gain.n} seeds" if error is not None else "one seed"
        against = f"; but {' and '.join(self.larger)}" if self.larger else ""
        verdict = "holds" if self.holds else "DOES NOT HOLD"
        return (
            f"{verdict}: {self.ours.peer.name} against {self.peer.peer.name}: robust accuracy "
            f"{100 * self.gain.mean:+.1f} points ({spread}){against}; wanted above 0 at no more bytes and milliseconds."
        )


def compare(ours: Summary, peer: Summary) -> Verdict | None:
    """The verdict, or None where a figure is missing."""
    seeds = sorted(set(ours.by_seed) & set(peer.by_seed))
    if not seeds:
        return None
    a, b = ours.figures, peer.figures
    larger = []
    if a["bytes"] > b["bytes"]:
        larger.append(f"{a['bytes'] / 1000:.1f} kB against {b['bytes'] / 1000:.1f} kB")
    if a["ms"] > SAME * b["ms"]:
        larger.append(f"{a['ms']:.3f} ms against {b['ms']:.3f} ms")
    return Verdict(ours, peer, value([ours.by_seed[s] - peer.by_seed[s] for s in seeds]), tuple(larger))


def volumes(made: Sequence[Summary]) -> list[dict[str, Any]]:
    """Per tool: the hypervolume of its rows in (bytes, robust) and (ms, robust), as shares of the reference box.

    The box reaches from nothing to the float ERM file's bytes and twice its milliseconds, and from chance to 100 %.
    """
    float_row = next((s for s in made if s.peer.tool == "float" and s.figures), None)
    if float_row is None:
        return []
    found = []
    for tool in dict.fromkeys(s.peer.tool for s in made):
        rows = [s for s in made if s.peer.tool == tool and s.figures]
        entry: dict[str, Any] = {"tool": tool, "rows": len(rows)}
        for cost, factor in (("bytes", 1.0), ("ms", 2.0)):
            worst = factor * float_row.figures[cost]
            points = [(s.figures[cost] / worst, s.accuracy["robust"].mean) for s in rows]
            entry[cost] = _pareto.hypervolume(points, (1.0, CHANCE)) / (1 - CHANCE)
        found.append(entry)
    return found


def table(made: Sequence[Summary]) -> list[str]:
    """The Markdown table."""
    head = ("#", "row", "test", "held out", "corrupted", "robust", "kB", "ms", "passes", "seconds", "lines", "seeds")
    out = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for s in made:
        cells = [str(s.number), s.peer.name]
        if s.figures:
            f = s.figures
            cells += [s.accuracy[m].text() for m in METRICS]
            cells += [f"{f['bytes'] / 1000:.1f}", f"{f['ms']:.3f}", f"{f['passes']:,.0f}", f"{f['seconds']:.0f}"]
            cells += [str(s.lines), str(len(s.by_seed))]
        else:
            cells += [f"did not finish: {s.problem}", *[""] * 7, str(s.lines), "0"]
        out.append(f"| {' | '.join(cells)} |")
    return out


def verdict_lines(made: Sequence[Summary]) -> tuple[list[Verdict], list[str]]:
    """The headline row against every peer, and a Markdown table of which other rows of ours do it."""
    ours = [s for s in made if s.peer.tool == OURS and s.figures]
    main = next((s for s in ours if s.peer.name == HEADLINE), None)
    verdicts: list[Verdict] = []
    out = [f"| peer | gain of *{HEADLINE}* | yes? | flatcompress rows that do it |", "|---|---|---|---|"]
    for s in made:
        if s.peer.tool == OURS or not s.figures or main is None:
            continue
        found = [v for o in ours if (v := compare(o, s)) is not None]
        first = next((v for v in found if v.ours is main), None)
        if first is None:
            continue
        verdicts.append(first)
        doing = ", ".join(f"{v.ours.number}" for v in found if v.holds) or "none"
        error = _sweeps.standard_error(first.gain)
        spread = f" (s.e. {100 * error:.1f})" if error is not None else ""
        less = () if first.gain.mean > 0 else ("robust accuracy is not higher",)
        reason = "**yes**" if first.holds else "no: " + "; ".join((*less, *first.larger))
        out.append(f"| {s.number} {s.peer.name} | {100 * first.gain.mean:+.1f}{spread} | {reason} | {doing} |")
    return verdicts, out


def drawing(made: Sequence[Summary]) -> str:
    """Robust accuracy against kilobytes and against milliseconds."""
    rows = [s for s in made if s.figures]
    panels = []
    for title, name, key, scale in (
        ("Robust accuracy against size", "kB (logarithmic)", "bytes", 1e-3),
        ("Robust accuracy against latency", "ms at batch 1, 1 thread (logarithmic)", "ms", 1.0),
    ):
        marks = [
            _pareto.Mark(str(s.number), s.peer.tool, scale * s.figures[key], 100 * s.accuracy["robust"].mean,
                         100 * (s.accuracy["robust"].std or 0.0)) for s in rows
        ]  # fmt: skip
        panels.append((title, name, marks))
    return _pareto.plot(panels, "robust accuracy, %", list(dict.fromkeys(s.peer.tool for s in rows)))


def publish(
    name: str, rows: Sequence[Peer], found: Found, choices: Mapping[str, Sequence[str]], options: argparse.Namespace,
    start: int,
) -> int:  # fmt: skip
    """Print and write table, verdicts, plot, JSON; the exit code."""
    made = summaries(rows, found)
    verdicts, verdict_table = verdict_lines(made)
    boxes = volumes(made)
    missing = [r.name for r in rows if r.name not in {s.peer.name for s in made}]
    text = page(made, verdicts, verdict_table, boxes, choices, options, start, missing)
    print(text)
    if not options.quick:
        _sweeps.DOCS.mkdir(parents=True, exist_ok=True)
        (_sweeps.DOCS / f"{name}.md").write_text(text)
        (_sweeps.DOCS / f"{name}.svg").write_text(drawing(made))
    short = [
        {"#": s.number, "row": s.peer.name, **{m: v.mean for m, v in s.accuracy.items()}, **s.figures, "lines": s.lines}
        for s in made
    ]
    missed = [v.text() for v in verdicts if not v.holds]
    runs = [{"seed": seed, "row": row, **figures} for seed, by_row in found.items() for row, figures in by_row.items()]
    code = _common.finish(
        name, short, missed, options, runs=runs, claims=[v.text() for v in verdicts], hypervolume=boxes,
        choices=dict(choices), versions=versions(rows), not_run=missing,
    )  # fmt: skip
    if not options.quick:
        _negative.write(_common.RESULTS, _sweeps.DOCS / "what-did-not-work.md")
    return code


def page(
    made: Sequence[Summary], verdicts: Sequence[Verdict], verdict_table: Sequence[str],
    boxes: Sequence[Mapping[str, Any]], choices: Mapping[str, Sequence[str]], options: argparse.Namespace, start: int,
    missing: Sequence[str] = (),
) -> str:  # fmt: skip
    """The Markdown page."""
    out = ["# Peers, side by side", "", INTRO.strip().format(start=start, epochs=options.epochs), "", *table(made), ""]
    out += ["![robust accuracy against bytes and milliseconds](peers.svg)", ""]
    out += ["The numbers beside the points are those of the table; bars are the standard deviation over seeds.", ""]
    held = sum(v.holds for v in verdicts)
    out += ["## Does the pipeline's file beat each peer's?", ""]
    out += [
        f"For {held} of {len(verdicts)} files, *{HEADLINE}* is more robust at no more bytes and no more milliseconds "
        f"({100 * (SAME - 1):.0f} % is equal). The last column names every row of flatcompress's that is, by number.",
        "",
        *verdict_table,
        "",
    ]
    out += ["## Hypervolume", ""]
    out += [
        "Area under a tool's Pareto front, as a share of the box from nothing to the reference point: chance (8.3 %) "
        "and the float ERM file's bytes, or twice its milliseconds. A tool with more rows has more chances.",
        "",
        "| tool | rows | bytes | milliseconds |",
        "|---|---|---|---|",
        *[f"| {b['tool']} | {b['rows']} | {b['bytes']:.3f} | {b['ms']:.3f} |" for b in boxes],
        "",
        READING.strip(),
        "",
    ]
    problems = [f"- {s.peer.name}: {s.problem}" for s in made if s.problem]
    out += ["## What could not be run", "", *problems, ""] if problems else []
    if missing:
        out += [f"Not run yet (the same command runs them and adds them): {'; '.join(missing)}.", ""]
    tuned = "; ".join(f"{row}: {' '.join(flags)}" for row, flags in choices.items())
    out += [f"Chosen by validation on the first seed: {tuned}.", ""] if tuned else []
    pins = ", ".join(f"{package} {version}" for package, version in versions([s.peer for s in made]).items())
    out += [f"Made by `python -m benchmarks.peers` on {_common.machine()['processor']}, one thread. {pins}.", ""]
    return "\n".join(out)


def versions(rows: Sequence[Peer]) -> dict[str, str]:
    """{package: version} of what the peers' environments hold, as far as their pins name it."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(r.environment for r in rows if r.environment):
        pinned = {pin.split("=")[0].split(">")[0].replace("_", "-") for pin in _peer_envs.PACKAGES[name]}
        for entry in _peer_envs.installed(name):
            package, _, version = entry.partition("==")
            if package.replace("_", "-") in pinned:
                found[package.replace("_", "-")] = version.split("+")[0]
    return found
