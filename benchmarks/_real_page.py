"""The page of `benchmarks.real_domains`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import _common
from benchmarks._real_rows import (
    CHOSEN_ON,
    CUTS,
    FLOATS,
    NETWORKS,
    REFERENCE,
    SHARES,
    WHOLE,
    contest,
    cuts,
    float_file,
    ladder,
    pipelines,
)
from benchmarks._real_said import PARTS, Run, best_radius, paired

PAGE = Path(__file__).parent.parent / "docs" / "results" / "real_domains.md"


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
    lines += _whole(runs)
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


def _whole(runs: Sequence[Run]) -> list[str]:
    """The pipelines' files."""
    table = []
    names = [n for r in pipelines() for n in ((float_file(r), r.name) if r.peer is not None else (r.name,))]
    for name in names:
        own = [r for r in runs if r.row == name]
        if not own:
            continue
        told: dict[str, Any] = {"file": name, "runs": len(own)}
        for part in ("robust", "corrupted", *PARTS):
            values = [v for r in own if (v := r.points(part)) is not None]
            error = "" if len(values) < 2 else f" ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"
            told[PARTS.get(part, part)] = f"{statistics.fmean(values):.1f}{error}"
        for key in ("kilobytes", "milliseconds", "passes"):
            told[key] = float(statistics.fmean(r.told[key] for r in own))
        table.append(told)
    if not table:
        return []
    return ["## The whole pipeline", "", _WHOLE, "", _common.markdown(table), "", *_unchosen(runs), ""]


def _unchosen(runs: Sequence[Run]) -> list[str]:
    """Our files against the peers' on the pairs that had no part in choosing our rows."""
    others = [run for run in runs if run.seed not in CHOSEN_ON]
    ours, theirs = ([r.name for r in pipelines() if (r.peer is None) is own] for own in (True, False))
    gains = {(mine, peer): paired(others, "Lite0", mine, peer, "robust") for mine in ours for peer in theirs}
    said = [f"- {mine} minus {peer}: {gain.text()}" for (mine, peer), gain in gains.items() if gain is not None]
    return ["Robust accuracy on the pairs that our rows were not chosen on, in points:", "", *said] if said else []


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
                for part in ("held_out", "pooled"):
                    gain = paired(runs, network, row.name, f"W{bits}A{bits} {REFERENCE}", part)
                    if gain is not None and gain.deviation:
                        table.append({
                            "network": network, "difference": f"{row.name} - {REFERENCE}", "figure": PARTS[part],
                            "pairs": len(gain.values), "deviation of a pair": f"{gain.deviation:.1f}",
                            "standard error": f"{gain.error:.1f}", "pairs for one point": gain.pairs_for_a_point,
                        })  # fmt: skip
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
        "- No row here: FQAT's own freezing of layers (arXiv 2509.00859), of which the abstract alone can be read; the "
        "nearest is GAQAT with a layer's scales together."
    )
    return "\n".join(lines)


def _tail(runs: Sequence[Run]) -> str:
    passes = sum(r.told["passes"] for r in runs)
    machine = _common.machine()
    return (
        f"Made by `python -m benchmarks.real_domains` on {machine['processor']}, torch {machine['torch']}, one thread: "
        f"{len(runs)} runs,\n{passes:,} passes over a batch. Every run is in "
        "benchmarks/results/real_domains_runs.jsonl.\nThey are of recipe schema 3: images are augmented "
        "and resized in other bits since, so new runs begin with `--restart`."
    )


_HEAD = """
# Real drawings, a pretrained network

942 emoji in 24 classes, each drawn by four hands (`flatcompress data emoji-domains`): three-dimensional (*render*),
Noto (*art*), Twemoji (*cartoon*), OpenMoji's black outlines (*outline*), 40 x 40 pixels. One style is held out in turn.
An emoji is in one part only, in all styles: *held out, unseen emoji* (the main figure) are those that neither training
nor selection showed in any style, *held out, seen emoji* the others, in the style that was never trained on. *Lite0* is
EfficientNet-Lite0's first eight blocks with ImageNet weights; the other network starts from nothing. Every epoch is
judged on the source styles' validation part as it ships, with BatchNorm's statistics estimated anew. Rows share split,
float start, batches and augmentation by seed. Figures are points of accuracy, mean ± standard error (pairs): row minus
the row named above the table. Undertrained, for the time it takes: 4 epochs of 53 steps after 10 (Lite0) or 40 of
float training, where the papers take thousands of steps.
"""
_LADDER = """
Row minus *{other}*, its own start: what is lost to the grid. Each row has one piece more than the row above, but for
the second, which is `freeze_bn: true` alone. *post-training start*: scales of least squared error and corrected biases
instead of LSQ's start. *relative steps*: `scale_steps: relative`, at most 2 thousandths of its size a step. *distilled*
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
methods train twice the epochs. Radii were tried on the first pair; its best stands for the method on the others.
*corrupted*: mean over the usual corruptions of in-domain test pictures.
""".strip()
_WHOLE = f"""
From the pretrained network to a file, everybody {WHOLE} epochs of one pass a step, or half as many of two. *robust*:
mean of corrupted and held-out accuracy (all emoji). The file's own accuracy in onnxruntime; milliseconds as a share of
the float network's file, timed by turns. The peers' rows are this toolkit's plain training and SAM with onnxruntime's
`quantize_static`, with weights of 8 or 7 bits, whichever validation prefers, after their float files; on drawn shapes
the peers are run in their own libraries ([peers](peers.md), [from scratch](from_scratch.md)). Ours: weights averaged
over steps (`averaging: swad`) in every stage, depthwise weights at 8 bits. The form of our rows and the length of
training were chosen among some thirty variants by the robust accuracy of the first two pairs, which are among those
here; below the table is what is left without them. A 6-bit row with four epochs of LSQ, 0.5 below plain training on the
one pair it was run on, was dropped for the one without training.
""".strip()
_WATCHED = """
Travel: median of how far scales end from their start, in percent. Disorder, conflict and frozen share: means over
quantizers and windows, of rows that watch. Sharpness: loss at a distance of 0.05 along the gradient minus the loss.
""".strip()
_POWER = """
Deviation of one pair's difference on the main figure, and how many pairs make one point two standard errors.
""".strip()
