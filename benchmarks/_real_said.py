"""What the runs of `benchmarks.real_domains` say: paired differences, their standard error, and which targets hold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks._peer_page import SAME
from benchmarks._real_rows import (
    CUTS,
    NETWORKS,
    REFERENCE,
    SEEDS,
    SHARES,
    Cell,
    contest,
    cuts,
    float_file,
    ladder,
    pipelines,
)

PARTS = {
    "test": "in domain",
    "held_out": "held out, unseen emoji",
    "held_out_seen": "held out, seen emoji",
    "pooled": "held out, all emoji",
}
POINTS = {4: 2.0, 3: 5.0}  # that a strong baseline may lose to float in domain
DERIVED = ("val", "corrupted", "pooled", "robust")  # figures that stand beside a run's accuracies


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
        value = (
            self.told.get(part) if part in ("val", "corrupted", "pooled", "robust") else self.told["accuracy"].get(part)
        )
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
    float_files = {row.name: float_file(row) for row in pipelines() if row.peer is not None}
    found = []
    for key, told in values.items():
        network, held_out, seed, row = key.split(" / ")
        found.append(Run(network, held_out, int(seed), row, told))
        if "float_file" in told:
            told = {**told["float_file"], "passes": told["passes"], "val": None}
            found.append(Run(network, held_out, int(seed), float_files[row], told))
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
    found += [_a_rule_wins(runs, network) for network in NETWORKS]
    found += [_radius_pays(runs, share) for share in reversed(SHARES)]
    return [*found, *_best_file(runs)]


def _radius_pays(runs: Sequence[Run], share: float) -> str:
    """AdaSAP against every other way to cut, on the mean of corrupted and held-out accuracy."""
    wanted = f"AdaSAP's adaptive radius at {share:.1%} of the multiply-accumulates"
    own, adaptive = [r for r in runs if r.network == "Lite0"], best_radius(runs, share, "adasap")
    told = []
    for method in CUTS:
        other = best_radius(own, share, method)
        if method == "adasap" or other is None or adaptive is None:
            continue
        gains = [paired(own, "Lite0", adaptive, other, part) for part in ("corrupted", "pooled")]
        if gains[0] is not None and gains[1] is not None:
            both = tuple((a + b) / 2 for a, b in zip(gains[0].values, gains[1].values, strict=True))
            told.append((method, Difference(both)))
    if not told:
        return f"NOT MEASURED: {wanted}"
    clear = all(g.error is not None and g.mean > g.error for _, g in told)
    said = "holds" if clear else "DOES NOT HOLD"
    gained = ", ".join(f"{method} {gain.text()}" for method, gain in told)
    return (
        f"{said}: {wanted} above every other way to cut by more than a standard error, mean of corrupted and held-out "
        f"accuracy: against {gained} points"
    )


def _best_file(runs: Sequence[Run]) -> list[str]:
    """Each pipeline's file against the peer's, and against what the peer's was before it was quantized."""
    peers = [row for row in pipelines() if row.peer is not None]
    theirs = [name for row in peers for name in (row.name, float_file(row))]
    ours = [row.name for row in pipelines() if row.peer is None]
    return [_file_wins(runs, mine, peer) for mine in ours for peer in theirs]


def _file_wins(runs: Sequence[Run], mine: str, peer: str) -> str:
    gain = paired(runs, "Lite0", mine, peer, "robust")
    if gain is None:
        return f"NOT MEASURED: {mine} against {peer}"
    size, speed = (_ratio(runs, mine, peer, key) for key in ("kilobytes", "milliseconds"))
    won = gain.error is not None and gain.mean > gain.error and size <= 1 and speed <= SAME
    return (
        f"{'holds' if won else 'DOES NOT HOLD'}: {mine} more robust than {peer} by more than a standard error at "
        f"fewer bytes and no more milliseconds: {gain.text()} points, {size:.2f} of the bytes, {speed:.2f} of the "
        "milliseconds"
    )


def _ratio(runs: Sequence[Run], row: str, other: str, key: str) -> float:
    means = [statistics.fmean(r.told[key] for r in runs if r.row == name) for name in (row, other)]
    return means[0] / means[1]


def _within_float(runs: Sequence[Run], bits: int, most: float) -> str:
    """The row is chosen by validation, as a user would; its loss is that of the test pictures."""
    wanted = f"W{bits}A{bits} within {most:g} points of float in domain"
    by_val = {row.name: paired(runs, "Lite0", row.name, "float ERM", "val") for row in ladder(bits)}
    known = _of_most({name: gap.values for name, gap in by_val.items() if gap is not None})
    if not known:
        return f"NOT MEASURED: {wanted}"
    name = max(known, key=lambda one: statistics.fmean(known[one]))
    gap = paired(runs, "Lite0", name, "float ERM", "test")
    assert gap is not None
    said = "holds" if gap.mean >= -most else "DOES NOT HOLD"
    return f"{said}: {wanted}: {name}, the best by validation, {gap.text()} points"


def _rules(bits: int) -> list[str]:
    return [row.name for row in contest(bits) if "GAQAT" in row.name]


def _a_rule_wins(runs: Sequence[Run], network: str) -> str:
    """One rule must win at both widths; the best of several at one width alone is what chance gives too."""
    best: dict[int, tuple[str, Difference]] = {}
    clear: list[set[str]] = []
    for bits in (4, 3):
        told = {
            row.removeprefix(f"W{bits}A{bits} "): gain
            for row in _rules(bits)
            if (gain := paired(runs, network, row, f"W{bits}A{bits} {REFERENCE}", "held_out")) is not None
        }
        enough = {
            rule for rule, g in told.items() if len(g.values) >= 5 and g.error is not None and g.mean > 2 * g.error
        }
        clear.append(enough)
        if told:
            known = enough or _of_most({rule: gain.values for rule, gain in told.items()})
            rule = max(known, key=lambda one: told[one].mean)
            best[bits] = (rule, told[rule])
    if not best:
        return f"NOT MEASURED: a rule for scales against {REFERENCE} on {network}"
    said = "holds" if set.intersection(*clear) else "DOES NOT HOLD"
    named = "; ".join(f"at {bits} bits the best is {rule}, {_with_power(gain)}" for bits, (rule, gain) in best.items())
    return (
        f"{said}: a rule for scales above {REFERENCE} on {network}, held-out style, by more than two standard errors "
        f"over 5 pairs or more, at 4 bits and at 3: {named}"
    )


def _with_power(gain: Difference) -> str:
    needed = "" if gain.pairs_for_a_point is None else f" ({gain.pairs_for_a_point} pairs would show one)"
    return f"{gain.text()} points{needed}"


def best_radius(runs: Sequence[Run], share: float, method: str) -> str | None:
    """The row of ``method`` with the best mean validation accuracy, of those that were run on the most pairs."""
    scores: dict[str, list[float]] = {}
    for row in cuts(share):
        values = [v for r in runs if r.row == row.name and (v := r.points("val")) is not None]
        if row.method == method and values:
            scores[row.name] = values
    return max(_of_most(scores), key=lambda name: statistics.fmean(scores[name]), default=None)


def _of_most(found: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """The rows that were run on the most pairs; others are not comparable with them."""
    most = max(map(len, found.values()), default=0)
    return {name: values for name, values in found.items() if len(values) == most}


def radius_in_question(runs: Sequence[Run], cell: Cell) -> bool:
    """Whether ``cell`` is to be run: of a cut, every radius in its network's first pair, then the best one alone."""
    share = cell.row.macs
    if share is None or cell.seed == SEEDS[0]:
        return True
    own = [r for r in runs if r.network == cell.network and r.seed == SEEDS[0]]
    best = best_radius(own, share, cell.row.method)
    return best is None or cell.row.name == best
