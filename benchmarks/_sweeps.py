"""Benchmarks that train: a sweep per benchmark, claims checked on paired runs, a page under docs/results.

A claim compares two methods on the runs that share seed and held-out domain; the page says of every claim whether it
holds, with the paired difference and its standard error, so a negative result stands there as plainly as a good one.
"""

from __future__ import annotations

import argparse
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks import _common, _negative
from flatcompress.sweep import pool, table
from flatcompress.sweep.pool import Finished
from flatcompress.sweep.spec import Sweep, parse_sweep
from flatcompress.sweep.table import Value

DOCS = Path(__file__).parent.parent / "docs" / "results"


@dataclass(frozen=True)
class Claim:
    """``method`` beats ``other`` on ``metric`` by at least ``least`` (in shares of 1).

    ``standard_errors``: the mean gain must also exceed this many standard errors of itself. ``or_equal``: as good is
    enough.
    """

    method: str
    other: str
    metric: str = "held_out"
    least: float = 0.0
    standard_errors: float = 0.0
    or_equal: bool = False


@dataclass(frozen=True)
class Verdict:
    """A claim and what was found; ``gain`` is None where the runs are missing."""

    claim: Claim
    gain: Value | None
    holds: bool

    def text(self) -> str:
        """One sentence."""
        c, names = self.claim, {"held_out": "the held-out domain", "corrupted": "corrupted images", "test": "test"}
        if self.gain is None:
            return f"{c.method} against {c.other} on {names[c.metric]}: not run."
        error = standard_error(self.gain)
        spread = f" (standard error {100 * error:.1f}, {self.gain.n} seeds)" if error is not None else " (one seed)"
        wanted = f"at least {100 * c.least:+.1f}" if c.least else "no less" if c.or_equal else "above 0"
        wanted += f" and above {c.standard_errors:g} standard errors" if c.standard_errors else ""
        return (
            f"{'holds' if self.holds else 'DOES NOT HOLD'}: {c.method} against {c.other} on {names[c.metric]} "
            f"{100 * self.gain.mean:+.1f} points{spread}; wanted {wanted}."
        )


def standard_error(value: Value) -> float | None:
    """Standard error of a mean over seeds; None for one seed."""
    return None if value.std is None else value.std / value.n**0.5


def judge(finished: Sequence[Finished], claims: Sequence[Claim]) -> list[Verdict]:
    """Every claim on the finished runs."""
    by_method: dict[str, list[Finished]] = {}
    for one in finished:
        by_method.setdefault(one.run.method, []).append(one)
    verdicts = []
    for claim in claims:
        pair = by_method.get(claim.method, []), by_method.get(claim.other, [])
        gain = table.paired(*pair, claim.metric)
        above = operator.ge if claim.or_equal else operator.gt
        holds = gain is not None and above(gain.mean, 0) and gain.mean >= claim.least
        if gain is not None and claim.standard_errors:
            error = standard_error(gain)
            holds = holds and (error is None or gain.mean > claim.standard_errors * error)
        verdicts.append(Verdict(claim, gain, holds))
    return verdicts


def arguments(
    doc: str | None, argv: Sequence[str] | None = None, own: Mapping[str, Mapping[str, Any]] | None = None
) -> argparse.Namespace:
    """The usual options, how to run a part of it, and the benchmark's ``own``, {flag: what add_argument takes}."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few methods, few epochs: a smoke run")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed, naming it")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default 1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="seeds (default 0 1 2)")
    parser.add_argument("--held-out", nargs="+", default=None, help="domains to hold out, in place of all of them")
    parser.add_argument("--only", nargs="+", default=None, help="methods whose name fits one of these patterns")
    parser.add_argument("--output", default="runs/benchmarks", help="where the runs go; finished ones are not repeated")
    parser.add_argument("--collect", action="store_true", help="run nothing: make the tables from what is finished")
    for flag, keys in (own or {}).items():
        parser.add_argument(flag, **keys)
    return parser.parse_args(argv)


def run(name: str, spec: Mapping[str, Any], options: argparse.Namespace) -> list[Finished]:
    """Run (or collect) the sweep ``spec``."""
    sweep = parse_sweep({"name": name, "output_dir": options.output, "jobs": options.jobs, **spec}, name)
    if options.seeds:
        sweep.seeds = options.seeds
    if options.held_out:
        sweep.held_out = options.held_out
    if options.only:
        sweep.methods = [m for m in sweep.methods if any(fnmatch(m.name, pattern) for pattern in options.only)]
    return collect(sweep) if options.collect else pool.run_sweep(sweep, pool.stderr)


def collect(sweep: Sweep) -> list[Finished]:
    """The finished runs of a sweep, whatever is missing."""
    return pool.finished_runs(sweep)


def publish(
    name: str,
    title: str,
    intro: str,
    sections: Mapping[str, Sequence[Finished]],
    claims: Sequence[Claim],
    options: argparse.Namespace,
) -> int:
    """Print the tables and verdicts, write results/NAME.json and docs/results/NAME.md (not with --quick); exit code."""
    every = [one for part in sections.values() for one in part]
    verdicts = judge(list({(f.run.method, f.run.held_out, f.run.seed): f for f in every}.values()), claims)
    lines = [f"# {title}", "", intro.strip(), ""]
    rows: list[dict[str, Any]] = []
    for heading, part in sections.items():
        if part:
            found = table.table(part)
            rows += [{"section": heading, **asdict(row)} for row in found]
            lines += [f"## {heading}", "", table.markdown(found, ""), ""]
    where = _common.machine()
    lines += ["## What holds", "", *[f"- {v.text()}" for v in verdicts], "", table.RULE, ""]
    lines += [
        f"Made by `python -m benchmarks.{name}` on {where['processor']}, torch {where['torch']}, Python",
        f"{where['python']}, one thread a run. *seconds* is wall time on a machine that did other work "
        "at the same time:",
        "compare *passes*.",
        "",
    ]
    text = "\n".join(line.rstrip() for line in lines)
    print(text)
    if not options.quick:
        DOCS.mkdir(parents=True, exist_ok=True)
        (DOCS / f"{name}.md").write_text(text)
    return _write(name, rows, verdicts, every, options)


def _write(
    name: str, rows: list[dict[str, Any]], verdicts: Sequence[Verdict], every: Sequence[Finished], options: Any
) -> int:
    failures = [v.text() for v in verdicts if not v.holds and v.gain is not None]
    cells = [
        {"method": f.run.method, "setting": f.run.setting, "held_out": f.run.held_out, "seed": f.run.seed,
         "val_accuracy": f.val_accuracy, "rows": [_brief(row) for row in f.rows]}
        for f in every
    ]  # fmt: skip
    short = [{"section": r["section"], "method": r["method"], "setting": r["setting"],
              **{k: r[k] and r[k]["mean"] for k in ("held_out", "test", "corrupted")}} for r in rows]  # fmt: skip
    code = _common.finish(name, short, failures, options, table=rows, runs=cells, claims=[v.text() for v in verdicts])
    if not options.quick:
        _negative.write(_common.RESULTS, DOCS / "what-did-not-work.md")
    return code


def _brief(row: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("stage", "method", "accuracy", "sharpness", "params", "nonzero", "macs", "bytes", "seconds", "passes")
    return {k: row.get(k) for k in keys}
