"""Which remedy for the fight between flatness and quantizer scales helps, if any? GAQAT's ablation and the search.

    python -m benchmarks.gaqat_variants [--quick] [--check] [--jobs N] [--seeds 0 1 2 3 4] [--bits 3] [--finalists 6]

The data, network and float SAGM start of `benchmarks.domain_generalization`, photo and cartoon held out in turn, one
radius for all rows, so that rows differ in what they do to the scales (or to the training around them) alone. Every
row is run on the first two seeds; the best by validation on the source styles, and the references, on all seeds.
Prints the tables, writes benchmarks/results/gaqat_variants.json and docs/results/gaqat_variants.md. `--finalists 0`
stops after that; `--collect` makes the page from the runs that are finished.

Targets (``--check`` exits 1 where one is missed), on the held-out style, paired by seed and style: the best variant by
validation on the source styles above naive LSQ+SAGM by more than one standard error, and not below GAQAT's default.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import _sweeps
from benchmarks._sweeps import Claim
from benchmarks.domain_generalization import DATA, MODEL, QAT_RHO, RHO, K, quantize, train
from flatcompress.sweep import table
from flatcompress.sweep.pool import Finished

NAME = "gaqat_variants"
STYLES = ["photo", "cartoon"]  # held out, sketch and art lie too near chance for differences between rows to show
SEEDS = [0, 1, 2, 3, 4]
NAIVE, PUBLISHED, DEFAULT = "LSQ+SAGM (naive)", "GAQAT as published: absolute tau 0.3", "GAQAT: quantile tau 0.3"
REFERENCES = ("float SAGM", NAIVE, PUBLISHED, DEFAULT)
QUANTILE = {"tau": 0.3, "tau_kind": "quantile"}
INTRO = f"""
Accuracy in percent on 12 drawn classes, W = A bits, from the float SAGM network, {K} steps a window (a run has 168),
radius {QAT_RHO} in every row, equal epochs and, but for the rows that say so, equal passes. A row *GAQAT, ...* is
GAQAT's default with the named switch changed; *naive, ...* is LSQ+SAGM with it: what helps without a rule for scales.
"""

# The switches of GAQAT, then other remedies, then what happens around the scales; each on GAQAT's default.
ABLATION: dict[str, dict[str, Any]] = {
    "tau quantile 0.15": {"tau": 0.15},
    "tau quantile 0.5": {"tau": 0.5},
    "tau sigma 1": {"tau": 1.0, "tau_kind": "sigma"},
    "K 10": {"K": 10},
    "K 40": {"K": 40},
    "mode gated": {"mode": "gated"},
    "mode opposed": {"mode": "opposed"},
    "freeze smooth": {"freeze_target": "smooth"},
    "freeze both": {"freeze_target": "both"},
    "granularity layer": {"granularity": "layer"},
    "no unfreezing": {"refreeze": False},
    "conflicted scales slowed": {"mode": "opposed", "remedy": "slow"},
    "smaller gradient projected": {"remedy": "project"},
}
AROUND: dict[str, dict[str, Any]] = {
    "scale_lr 0.03": {"scale_lr": 0.03},
    "scale_lr 0.3": {"scale_lr": 0.3},
    "perturbed after the quantizer": {"perturb_point": "quantized"},
    "quantizers after a third": {"quant_start": 0.34},
    "SWAD": {"averaging": "swad"},
    "distilled": {"distill": 1.0},
    "distilled, SWAD": {"distill": 1.0, "averaging": "swad"},
}
PLAIN = ("SWAD", "distilled")  # of these also naive LSQ+SAGM with it: what helps without any rule


def methods(bits: Sequence[int], epochs: tuple[int, int], quick: bool) -> list[dict[str, Any]]:
    """Every row at every bit width."""
    start = train("sagm", epochs[0], rho=RHO)
    rows: list[dict[str, Any]] = [{"name": "float SAGM", "stages": [start]}]
    for b in bits:

        def row(label: str, method: str, b: int = b, **keys: Any) -> dict[str, Any]:
            return {"name": f"W{b}A{b} {label}", "stages": [start, quantize(method, b, epochs[1], rho=QAT_RHO, **keys)]}

        rows += [
            row(NAIVE, "lsq_sagm"),
            row(PUBLISHED, "gaqat", K=K, tau=0.3, tau_kind="absolute"),
            row(DEFAULT, "gaqat", K=K, **QUANTILE),
        ]
        if quick:
            continue
        rows += [row(f"GAQAT, {n}", "gaqat", **{"K": K, **QUANTILE, **keys}) for n, keys in ABLATION.items()]
        rows += [row(f"GAQAT, {n}", "gaqat", **{"K": K, **QUANTILE, **keys}) for n, keys in AROUND.items()]
        rows += [row(f"naive, {n}", "lsq_sagm", **AROUND[n]) for n in PLAIN]
        rows += [row("LSQ+SAGM, Bloop on the scales", "scale_bloop")]
    return rows


def is_reference(name: str) -> bool:
    """Is ``name`` one of the rows that the others are measured against?"""
    return name.endswith(REFERENCES)


def by_row(finished: Iterable[Finished]) -> dict[str, list[Finished]]:
    """{row: its runs}, in order."""
    found: dict[str, list[Finished]] = {}
    for one in finished:
        found.setdefault(one.run.method, []).append(one)
    return found


def cells(runs: Iterable[Finished]) -> dict[tuple[int, str | None], float]:
    """Validation accuracy on the source styles by (seed, held-out style)."""
    return {(r.run.seed, r.run.held_out): r.val_accuracy for r in runs if r.val_accuracy is not None}


def ranking(finished: Sequence[Finished], bits: int) -> dict[str, float]:
    """{row of ``bits``: mean gain in validation over naive on the runs that both have}, best first.

    A row that lacks runs which naive has is left out: gains over different runs cannot be ranked.
    """
    rows = by_row(finished)
    naive = cells(rows.get(f"W{bits}A{bits} {NAIVE}", []))
    found = {}
    for name, runs in rows.items():
        own = cells(runs)
        if naive and name.startswith(f"W{bits}A{bits} ") and naive.keys() <= own.keys():
            found[name] = statistics.fmean(own[key] - value for key, value in naive.items())
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def finalists(finished: Sequence[Finished], bits: Sequence[int], count: int) -> list[str]:
    """The references and, per bit width, the ``count`` best other rows by validation on the source styles."""
    names = list(by_row(finished))
    chosen = {name for name in names if is_reference(name)}
    for b in bits:
        chosen |= set([n for n in ranking(finished, b) if not is_reference(n)][:count])
    return [name for name in names if name in chosen]


def gains(finished: Sequence[Finished], bits: int) -> str:
    """A table: each row of ``bits`` against naive LSQ+SAGM, paired by seed and style, best by validation first."""
    rows = by_row(finished)
    naive = rows.get(f"W{bits}A{bits} {NAIVE}", [])
    lines = [
        "| gain over naive, points | validation, source styles | held out | standard error | in domain | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name, value in ranking(finished, bits).items():
        gain, inside = (table.paired(rows[name], naive, metric) for metric in ("held_out", "test"))
        if gain is not None and inside is not None:
            error = _sweeps.standard_error(gain)
            figures = [value, gain.mean, error, inside.mean]
            shown = ["" if f is None else f"{100 * f:.1f}" if f is error else f"{100 * f:+.1f}" for f in figures]
            lines.append(f"| {name} | {' | '.join(shown)} | {gain.n} |")
    return "\n".join(lines)


def claims(finished: Sequence[Finished], bits: Sequence[int]) -> list[Claim]:
    """The targets of the module's docstring, for the winner by validation at each bit width."""
    found = []
    for b in bits:
        ranked = [n for n in ranking(finished, b) if not is_reference(n)]
        naive, default = f"W{b}A{b} {NAIVE}", f"W{b}A{b} {DEFAULT}"
        if ranked:
            found += [Claim(ranked[0], naive, standard_errors=1), Claim(ranked[0], default)]
        found += [Claim(name, naive, standard_errors=1) for name in (default, f"W{b}A{b} {PUBLISHED}")]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; the exit code."""
    own: dict[str, dict[str, Any]] = {
        "--bits": {"type": int, "nargs": "+", "default": [3], "choices": range(2, 9)},
        "--finalists": {"type": int, "default": 6, "help": "rows that are run on every seed (0: none)"},
        "--screening": {"type": int, "default": 2, "help": "seeds on which every row is run"},
    }
    options = _sweeps.arguments(__doc__, argv, own)
    seeds = options.seeds or ([0] if options.quick else SEEDS)
    spec: dict[str, Any] = {
        "recipe": {"device": "cpu", "threads": 1, "data": DATA, "model": MODEL, "stages": [train("none", 1)]},
        "methods": methods(options.bits, (4, 2) if options.quick else (12, 6), options.quick),
        "held_out": ["sketch"] if options.quick else STYLES,
        "seeds": seeds,
    }
    options.seeds = seeds[: options.screening]
    screened = _sweeps.run(NAME, spec, options)
    final: list[Finished] = []
    if options.finalists and len(seeds) > options.screening:
        keep = finalists(screened, options.bits, options.finalists)
        options.seeds = seeds
        final = _sweeps.run(NAME, {**spec, "methods": [m for m in spec["methods"] if m["name"] in keep]}, options)
    sections, tables = {}, []
    for b in options.bits:
        for heading, part in ((f"{b} bits, {len(seeds)} seeds", final), (f"{b} bits, every row", screened)):
            if part:
                sections[heading] = [f for f in part if f.run.method.startswith((f"W{b}A", "float"))]
                tables.append(f"**{heading}**\n\n{gains(part, b)}")
    intro = "\n\n".join([INTRO.strip(), *tables])
    judged = claims(final or screened, options.bits)
    return _sweeps.publish(NAME, "GAQAT: ablation and variants", intro, sections, judged, options)


if __name__ == "__main__":
    sys.exit(main())
