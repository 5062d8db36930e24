"""The page and the plot of `benchmarks.search`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import _common, _pareto

GROUPS = {"hand": "by hand", "control": "control", "search": "found"}
INTRO = """# Does a search beat recipes by hand?

Written by `python -m benchmarks.search`: styled shapes, a small residual network, seeds {seeds}. By hand: the six
recipes of [peers](peers.md) and their float start, with *sketch* held out. Found: a
[search](../search.md) on the other three styles, *cartoon* held out, {trials} points a seed, then its front's
recipes with *sketch* held out. No point counts that took more forward and backward passes than the dearest recipe
by hand. The control is that recipe at the learning rates of the most robust point found.

## Area under the front

Robust accuracy (the mean of held out and corrupted) against the cost, as a share of the box from nothing to chance
and the float file's bytes, or twice its milliseconds. *With control*: the recipes by hand and the control.

"""
AFTER = """
{verdict}

What the control says: {control} of the mean gain against bytes, and {control_ms} of that against milliseconds, is
there once the dearest recipe by hand is trained at the learning rates that the search found; the rest is bits,
channels, low-bit methods, radii and the choice among several points. The recipes by hand have this repository's
usual learning rates, not tuned for these runs; a search that may vary them finds that first. How the search itself
was chosen, and what was known of these seeds by then, is in the benchmark's docstring.

A front has {fronts} points, by hand there are {hands}, and the area takes the best of either on the style that
nothing was chosen by, so more points help. Of as many points as by hand, evenly along the front, the mean area is
{many} larger against bytes and {many_ms} against milliseconds. {beaten}

![robust accuracy against bytes and milliseconds](search.svg)

## Every point

"""


def page(
    rows: Sequence[Mapping[str, Any]], by_seed: Mapping[int, Mapping[str, float]], searches: Mapping[int, Any],
    failures: Sequence[str],
) -> str:  # fmt: skip
    """docs/results/search.md."""
    lines = [volume_row(f"{seed}", found) for seed, found in by_seed.items()]
    keys = next(iter(by_seed.values()))
    mean = {key: statistics.fmean(found[key] for found in by_seed.values()) for key in keys}
    trials = max((s or {}).get("counts", {}).get("trials", 0) for s in searches.values())
    intro = INTRO.format(seeds=", ".join(map(str, by_seed)), trials=trials)
    gained = {c: share_of_gain(mean, c) for c in ("bytes", "ms")}
    after = AFTER.format(
        verdict="Targets: " + ("; ".join(failures) or "both met") + ".", beaten=better_control(by_seed),
        control=gained["bytes"], control_ms=gained["ms"], fronts=sizes(rows, "search"), hands=sizes(rows, "hand"),
        many=f"{mean['as many, bytes'] / mean['hand, bytes'] - 1:.0%}",
        many_ms=f"{mean['as many, ms'] / mean['hand, ms'] - 1:.0%}",
    )  # fmt: skip
    ordered = sorted(rows, key=lambda row: (row["seed"], group(row["row"]) == "search", row["bytes"]))
    return (
        intro + _common.markdown([*lines, volume_row("mean", mean)]) + "\n" + after + _common.markdown(ordered) + "\n"
    )


def volume_row(name: str, found: Mapping[str, float]) -> dict[str, Any]:
    """A line of the table of areas: the three of each cost, and how much larger the search's is."""
    row: dict[str, Any] = {"seed": name}
    for cost in ("bytes", "ms"):
        hand, search = found[f"hand, {cost}"], found[f"search, {cost}"]
        row |= {f"by hand, {cost}": hand, f"with control, {cost}": found[f"control, {cost}"],
                f"search, {cost}": search, f"gain, {cost}": f"{search / hand - 1:+.0%}"}  # fmt: skip
    return row


def share_of_gain(mean: Mapping[str, float], cost: str) -> str:
    """What the control has of the search's gain, in percent; a sentence's word where there is no gain."""
    hand, control, search = (mean[f"{who}, {cost}"] for who in ("hand", "control", "search"))
    return f"{(control - hand) / (search - hand):.0%}" if search > hand else "nothing (there is none)"


def better_control(by_seed: Mapping[int, Mapping[str, float]]) -> str:
    """A sentence: on which seeds the recipes by hand with the control have the larger area against bytes."""
    seeds = [str(seed) for seed, found in by_seed.items() if found["control, bytes"] > found["search, bytes"]]
    if not seeds:
        return "On no seed is the area with the control larger than the search's."
    return f"On seed {' and '.join(seeds)} the area against bytes is larger with the control than the search's."


def sizes(rows: Sequence[Mapping[str, Any]], who: str) -> str:
    """How many points of a kind a seed has: one number, or the least to the most."""
    seeds = {row["seed"] for row in rows}
    counts = sorted({sum(group(r["row"]) == who and r["seed"] == seed for r in rows) for seed in seeds})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def group(name: str) -> str:
    """Whose a row is."""
    return "search" if name.startswith("trial-") else "control" if name.startswith("control") else "hand"


def plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """docs/results/search.svg: every point of every seed."""
    panels = []
    for cost, shown in (("bytes", "bytes of the file"), ("ms", "milliseconds")):
        marks = [_pareto.Mark("", GROUPS[group(row["row"])], row[cost], 100 * row["robust"]) for row in rows]
        panels.append((f"Robust accuracy against {cost}", shown, marks))
    return _pareto.plot(panels, "robust accuracy in percent", list(GROUPS.values()))
