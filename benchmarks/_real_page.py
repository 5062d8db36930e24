"""What the runs of `benchmarks.real_domains` say: paired differences, their standard error, and the page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import _common
from benchmarks._real_rows import CUTS, FLOATS, NETWORKS, REFERENCE, SHARES, contest, cuts, ladder

PAGE = Path(__file__).parent.parent / "docs" / "results" / "real_domains.md"
PARTS = {"test": "in domain", "held_out": "held out, unseen emoji", "held_out_seen": "held out, seen emoji"}
POINTS = {4: 2.0, 3: 5.0}  # that a strong baseline may lose to float in domain


@dataclass(frozen=True)
class Run:
    """One finished run."""

    network: str
    held_out: str
    seed: int
    row: str
    told: Mapping[str, Any]

    def points(self, part: str) -> float | None:
        """Accuracy in percent."""
        value = self.told.get(part) if part in ("val", "corrupted") else self.told["accuracy"].get(part)
        return None if value is None else 100 * value


@dataclass(frozen=True)
class Difference:
    """Paired differences in points."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Of a single pair."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def error(self) -> float | None:
        """Standard error of the mean."""
        return None if self.deviation is None else self.deviation / math.sqrt(len(self.values))

    @property
    def pairs_for_a_point(self) -> int | None:
        """Pairs after which one point is two standard errors."""
        return None if self.deviation is None else max(2, math.ceil((2 * self.deviation) ** 2))

    def text(self) -> str:
        """+1.2 +- 0.4 (5)."""
        error = "" if self.error is None else f" ± {self.error:.1f}"
        return f"{self.mean:+.1f}{error} ({len(self.values)})"


def read(values: Mapping[str, Any]) -> list[Run]:
    """The runs that are kept."""
    found = []
    for key, told in values.items():
        network, held_out, seed, row = key.split(" / ")
        found.append(Run(network, held_out, int(seed), row, told))
    return found


def paired(runs: Sequence[Run], network: str, row: str, other: str, part: str) -> Difference | None:
    """``row`` minus ``other`` in every pair of runs with the same style, seed and start."""
    by = {(r.row, r.held_out, r.seed): r.points(part) for r in runs if r.network == network}
    values = [
        value - against
        for (name, style, seed), value in by.items()
        if name == row and value is not None and (against := by.get((other, style, seed))) is not None
    ]
    return Difference(tuple(values)) if values else None


def verdicts(runs: Sequence[Run]) -> list[str]:
    """One sentence a target: holds, does not hold or not measured."""
    found = [_within_float(runs, bits, most) for bits, most in POINTS.items()]
    for network in NETWORKS:
        found.append(_a_rule_wins(runs, network))
    return found


def _within_float(runs: Sequence[Run], bits: int, most: float) -> str:
    """The row is chosen by validation, as a user would; its loss is that of the test pictures."""
    wanted = f"W{bits}A{bits} within {most:g} points of float in domain"
    by_val = {row.name: paired(runs, "Lite0", row.name, "float ERM", "val") for row in ladder(bits)}
    known = {name: gap.mean for name, gap in by_val.items() if gap is not None}
    if not known:
        return f"NOT MEASURED: {wanted}"
    name = max(known, key=lambda one: known[one])
    gap = paired(runs, "Lite0", name, "float ERM", "test")
    assert gap is not None
    said = "holds" if gap.mean >= -most else "DOES NOT HOLD"
    return f"{said}: {wanted}: {name}, the best by validation, {gap.text()} points"


def _rules(bits: int) -> list[str]:
    return [row.name for row in contest(bits) if "GAQAT" in row.name]


def _a_rule_wins(runs: Sequence[Run], network: str) -> str:
    told = []
    for bits in (4, 3):
        for row in _rules(bits):
            gain = paired(runs, network, row, f"W{bits}A{bits} {REFERENCE}", "held_out")
            if gain is not None:
                told.append((row, gain))
    if not told:
        return f"NOT MEASURED: a rule for scales against {REFERENCE} on {network}"
    enough = [(row, g) for row, g in told if len(g.values) >= 5 and g.error is not None and g.mean > 2 * g.error]
    row, gain = max(enough or told, key=lambda one: one[1].mean)
    said = "holds" if enough else "DOES NOT HOLD"
    needed = "" if gain.pairs_for_a_point is None else f"; {gain.pairs_for_a_point} pairs would show one point"
    return (
        f"{said}: a rule for scales above {REFERENCE} on {network}, held-out style, by more than two standard errors "
        f"over 5 pairs or more: the best is {row}, {gain.text()} points{needed}"
    )


def summary(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per network and method: means over its runs."""
    found = []
    for network in NETWORKS:
        own = [r for r in runs if r.network == network]
        for name in dict.fromkeys(r.row for r in own):
            part = [r for r in own if r.row == name]
            row: dict[str, Any] = {"network": network, "row": name, "runs": len(part)}
            for key in ("val", *PARTS):
                values = [v for r in part if (v := r.points(key)) is not None]
                row[key] = round(statistics.fmean(values), 1) if values else None
            row["passes"] = part[0].told["passes"]
            found.append(row)
    return found


def page(runs: Sequence[Run], said: Sequence[str]) -> str:
    """docs/results/real_domains.md."""
    lines = [_HEAD.strip(), ""]
    lines += ["## What holds", "", *[f"- {one}" for one in said], ""]
    for network in NETWORKS:
        own = [r for r in runs if r.network == network]
        if not own:
            lines += [f"## {network}", "", "Not measured yet.", ""]
            continue
        for bits in (4, 3):
            lines += _against(own, network, f"{network}: the baseline at {bits} bits", [r.name for r in ladder(bits)],
                              "float ERM", _LADDER)  # fmt: skip
        for bits in (4, 3):
            rows = [r.name for r in contest(bits)]
            lines += _against(own, network, f"{network}: rules for scales at {bits} bits", rows,
                              f"W{bits}A{bits} {REFERENCE}", _CONTEST)  # fmt: skip
        lines += _watched(own)
        for share in SHARES:
            lines += _cut(own, network, share)
    if runs:
        lines += ["## All rows", "", _common.markdown(summary(runs)), ""]
    lines += [*_power(runs), "## What was not measured", "", _missing(runs), "", _tail(runs), ""]
    return "\n".join(line.rstrip() for line in lines)


def _against(
    runs: Sequence[Run], network: str, title: str, rows: Sequence[str], other: str, intro: str
) -> list[str]:  # fmt: skip
    table = []
    for row in rows:
        told: dict[str, Any] = {"row": row}
        for part, label in PARTS.items():
            gain = paired(runs, network, row, other, part)
            told[label] = None if gain is None else gain.text()
        own = [r for r in runs if r.row == row]
        if row != other and own and any(told[label] for label in PARTS.values()):
            told["passes"] = own[0].told["passes"]
            table.append(told)
    if not table:
        return []
    return [f"## {title}", "", intro.format(other=other), "", _common.markdown(table), ""]


def best_radius(runs: Sequence[Run], share: float, method: str) -> str | None:
    """The row of ``method`` with the best mean validation accuracy, of those that were run on the most pairs."""
    scores: dict[str, list[float]] = {}
    for row in cuts(share):
        values = [v for r in runs if r.row == row.name and (v := r.points("val")) is not None]
        if row.method == method and values:
            scores[row.name] = values
    most = max(map(len, scores.values()), default=0)
    return max(
        (n for n, v in scores.items() if len(v) == most), key=lambda n: statistics.fmean(scores[n]), default=None
    )


def _cut(runs: Sequence[Run], network: str, share: float) -> list[str]:
    uniform, table = best_radius(runs, share, "asam"), []
    for method in CUTS:
        row = best_radius(runs, share, method)
        if row is None or uniform is None or row == uniform:
            continue
        told: dict[str, Any] = {"row": row}
        for part, label in (*PARTS.items(), ("corrupted", "corrupted")):
            gain = paired(runs, network, row, uniform, part)
            told[label] = None if gain is None else gain.text()
        table.append(told)
    if not table:
        return []
    title = f"## {network}: {share:.1%} of the multiply-accumulates left, cut at once"
    return [title, "", _CUT.format(other=uniform), "", _common.markdown(table), ""]


def _watched(runs: Sequence[Run]) -> list[str]:
    table = []
    for name in dict.fromkeys(r.row for r in runs):
        told = [r.told for r in runs if r.row == name]
        if "travel" not in told[0]:
            continue
        row: dict[str, Any] = {"row": name, "runs": len(told)}
        for kind in ("weights", "activations"):
            travels = [100 * t["travel"][kind] for t in told if kind in t["travel"]]
            row[f"travel of {kind}' scales, %"] = f"{statistics.fmean(travels):.1f}" if travels else None
        for key in ("disorder", "conflict", "frozen"):
            values = [t["watch"][key] for t in told if "watch" in t]
            row[key] = f"{statistics.fmean(values):.2f}" if values else None
        row["sharpness"] = f"{statistics.fmean(t['sharpness'] for t in told):.3f}"
        table.append(row)
    return ["## What scales do", "", _WATCHED, "", _common.markdown(table), ""] if table else []


def _power(runs: Sequence[Run]) -> list[str]:
    lines = ["## Power", "", _POWER, ""]
    table = []
    for network in NETWORKS:
        for bits in (4, 3):
            for row in contest(bits):
                gain = paired(runs, network, row.name, f"W{bits}A{bits} {REFERENCE}", "held_out")
                if gain is not None and gain.deviation is not None:
                    table.append({
                        "network": network, "difference": f"{row.name} - {REFERENCE}", "pairs": len(gain.values),
                        "deviation of a pair": f"{gain.deviation:.1f}", "standard error": f"{gain.error:.1f}",
                        "pairs for one point": gain.pairs_for_a_point,
                    })  # fmt: skip
    table = [row for row in table if not row["difference"].endswith(f"{REFERENCE} - {REFERENCE}")]
    return [*lines, _common.markdown(table) if table else "No difference has two pairs yet.", ""]


def _missing(runs: Sequence[Run]) -> str:
    """Rows without a run, and what has no row here."""
    done = {(r.network, r.row) for r in runs}
    lines = []
    for network in NETWORKS:
        rows = [*FLOATS, *(row for bits in (4, 3) for row in [*ladder(bits), *contest(bits)])]
        rows += [row for share in SHARES for row in cuts(share)]
        names = [row.name for row in rows if (network, row.name) not in done]
        some = "; ".join(names) if 0 < len(names) < len(rows) else "every row" if names else "nothing"
        lines.append(f"- {network}: {some}.")
    lines.append(
        "- No row here: FQAT's own freezing of layers (arXiv 2509.00859; the nearest is GAQAT with a layer's scales "
        "together); the whole pipeline on these drawings."
    )
    return "\n".join(lines)


def _tail(runs: Sequence[Run]) -> str:
    passes = sum(r.told["passes"] for r in runs)
    machine = _common.machine()
    return (
        f"Made by `python -m benchmarks.real_domains` on {machine['processor']}, torch {machine['torch']}, one thread: "
        f"{len(runs)} runs,\n{passes:,} passes over a batch. Every run is in "
        "benchmarks/results/real_domains_runs.jsonl."
    )


_HEAD = """
# Real drawings, a pretrained network

942 emoji in 24 classes, each drawn by four hands (`flatcompress data emoji-domains`): three-dimensional (*render*),
Noto (*art*), Twemoji (*cartoon*), OpenMoji's black outlines (*outline*), 32 x 32 pixels. One style is held out in turn.
An emoji is in one part only, in all styles: *held out, unseen emoji* (the main figure) are those that neither training
nor selection showed in any style, *held out, seen emoji* the others, in the style that was never trained on. *Lite0* is
EfficientNet-Lite0's first eleven blocks with ImageNet weights; the other network starts from nothing. Every epoch is
judged on the source styles' validation part as it ships, with BatchNorm's statistics estimated anew. Rows share split,
float start, batches and augmentation by seed. Figures are points of accuracy, mean ± standard error (pairs): row minus
the row named above the table. Undertrained, for the time it takes: 4 epochs of 53 steps after 10 of float training,
where the papers take thousands of steps.
"""
_LADDER = """
Row minus *{other}*, its own start: what is lost to the grid. Each row has one piece more than the row above, but for
the second, which is `freeze_bn: true` alone. *post-training start*: scales of least squared error and corrected biases
instead of LSQ's start. *relative steps*: `scale_steps: relative`, at most a thousandth of its size a step. *distilled*
from the float start. *scales first*: a tenth of the steps moves scales alone. The last ones each change the distilled
row; *post-training alone* trains nothing.
""".strip()
_CONTEST = """
Row minus *{other}*. Every row is on the strong baseline (post-training start, relative steps, distilled) with its
batches, and scales move at three times its rate: where they stand still no rule can matter. Two-pass methods (SAM,
SAGM) take twice LSQ's passes, and *SAGM's passes* is LSQ with as many.
""".strip()
_CUT = """
Row minus *{other}* (one radius for all channels), each at its best radius by validation on the source styles; one-pass
methods train twice the epochs. *corrupted*: mean over the usual corruptions of in-domain test pictures.
""".strip()
_WATCHED = """
Travel: median of how far scales end from their start, in percent. Disorder, conflict and frozen share: means over
quantizers and windows, of rows that watch. Sharpness: loss at a distance of 0.05 along the gradient minus the loss.
""".strip()
_POWER = """
Deviation of one pair's difference on the main figure, and how many pairs make one point two standard errors.
""".strip()
