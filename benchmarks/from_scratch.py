"""A pipeline that starts flat beside the strongest of the peers, in as many passes, on drawn shapes.

    python -m benchmarks.from_scratch [--quick] [--check] [--seeds 0 1 2 3 4]

Of all libraries in `benchmarks.peers` one recipe stood above flatcompress's: pytorch_optimizer's SAM from an untrained
network, and onnxruntime's `quantize_static`. Here it stands beside recipes of ours that begin untrained too, paired by
seed: same images, same initial weights, as many passes. The peer runs in its own library and environment. Prints the
table, writes benchmarks/results/from_scratch.json and docs/results/from_scratch.md. Runs that are finished are not run
again.

Target (``--check`` exits 1 where it is missed): one of our files is more robust (mean of corrupted and held-out
accuracy) than the peer's by more than a standard error, at fewer bytes and no more milliseconds (3 % is equal).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import _common
from benchmarks._peer_page import SAME, Found, robust
from benchmarks._peer_rows import OURS, QAT_RHO, RHO, START_EPOCHS, K, Peer, peers, prune, quantize, train
from benchmarks._peer_runs import Arena, start_epochs

NAME = "from_scratch"
PAGE = Path(__file__).parent.parent / "docs" / "results" / f"{NAME}.md"
EPOCHS = 12  # after the first ones
STRONG = {"start": "post_training", "scale_steps": "relative", "scale_lr": 2.0, "distill": 1.0}


def rows(quick: bool) -> list[Peer]:
    """The peer's two files, then ours."""
    last = 1 if quick else EPOCHS // 3
    begin = train("sagm", start_epochs(quick), rho=RHO)
    cut = prune("adasap", 0.5, 1 if quick else EPOCHS - last, round_to=8)
    whole = train("sam", 2 if quick else START_EPOCHS + EPOCHS - last // 2, rho=RHO)
    theirs = [row for row in peers(False) if "from scratch" in row.name]
    return [
        *theirs,
        _own("SAGM, AdaSAP, GAQAT W4A4", begin, cut, quantize("gaqat", 4, last, K=K, rho=QAT_RHO)),
        _own("SAGM, AdaSAP, LSQ W4A8", begin, cut, quantize("lsq", 4, 2 * last, activation_bits=8, **STRONG)),
        _own("SAM, LSQ W4A8, every channel", whole, quantize("lsq", 4, last, activation_bits=8, **STRONG)),
    ]


def _own(label: str, *stages: dict[str, Any]) -> Peer:
    recipe = [*stages, {"export": {"profile": "packed", "latency": False}}]
    flags = ("--stages", json.dumps(recipe))
    return Peer(f"{OURS}: from scratch: {label}", OURS, "flat_pipeline", None, flags, passes=None, scratch=True)


def verdicts(made: Sequence[Peer], found: Found) -> list[str]:
    """One sentence for each file of ours."""
    peer = next(row for row in made if row.after)
    said = []
    for row in (r for r in made if r.tool == OURS):
        both = [(f[row.name], f[peer.name]) for f in found.values() if row.name in f and peer.name in f]
        if len(both) < 2:
            said.append(f"NOT MEASURED: {row.name}")
            continue
        gains = [100 * (robust(mine) - robust(theirs)) for mine, theirs in both]
        mean, error = statistics.fmean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
        size, speed = (statistics.fmean(m[k] for m, _ in both) / statistics.fmean(t[k] for _, t in both)
                       for k in ("bytes", "ms"))  # fmt: skip
        won = mean > error and size < 1 and speed <= SAME
        said.append(
            f"{'holds' if won else 'DOES NOT HOLD'}: *{row.name}* above *{peer.name}*: {mean:+.1f} ± {error:.1f} "
            f"points ({len(gains)} pairs), {size:.2f} of the bytes, {speed:.2f} of the milliseconds"
        )
    return said


def table(made: Sequence[Peer], found: Found) -> list[dict[str, Any]]:
    """A row a file: mean ± deviation over seeds."""
    lines = []
    for row in made:
        own = [f[row.name] for f in found.values() if row.name in f]
        if not own:
            continue
        told: dict[str, Any] = {"file": row.name}
        for key in ("test", "held_out", "corrupted"):
            told[key] = _spread([100 * f[key] for f in own])
        told["robust"] = _spread([100 * robust(f) for f in own])
        told["kB"] = round(statistics.fmean(f["bytes"] for f in own) / 1000, 1)
        told["ms"] = round(statistics.fmean(f["ms"] for f in own), 3)
        lines.append({**told, "passes": own[0]["passes"], "seeds": len(own)})
    return lines


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; the exit code."""
    options = _common.arguments(__doc__, argv, _seeds)
    torch.set_num_threads(1)
    made, found = rows(options.quick), {}
    for seed in [options.seeds[0]] if options.quick else options.seeds:
        folder = options.output / f"{NAME}{'-quick' if options.quick else ''}" / f"seed-{seed}"
        arena = Arena(folder, seed, 2 if options.quick else EPOCHS, start_epochs(options.quick), {})
        arena.prepare()
        done = {row.name: arena.row(row) for row in made}
        good = {name: dict(figures) for name, figures in done.items() if "problem" not in figures}
        for name, figures in done.items():
            if "problem" in figures:
                print(f"seed {seed}: {name}: {figures['problem']}", file=sys.stderr)
        for name, ms in arena.latencies(list(good), 15 if options.quick else 40).items():
            good[name]["ms"] = ms
        found[seed] = good
    said, lines = verdicts(made, found), table(made, found)
    machine = _common.machine()
    made_on = f"Made by `python -m benchmarks.{NAME}` on {machine['processor']}, torch {machine['torch']}, one thread."
    claims = "\n".join(f"- {one}" for one in said)
    text = f"{_HEAD.strip()}\n\n{_common.markdown(lines)}\n\n{claims}\n\n{made_on}\n"
    print(text)
    if not options.quick:
        PAGE.write_text(text)
    missed = [] if any(one.startswith("holds") for one in said) else said
    return _common.finish(NAME, lines, missed, options, claims=said)


def _seeds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="where the runs go")


_HEAD = f"""
# Starting flat, beside the strongest peer

Twelve drawn classes, three styles trained on, *sketch* held out; a residual network of 78 k parameters from its initial
weights, {START_EPOCHS} epochs and then {EPOCHS} more of two passes a step, or as many passes. Accuracy in percent of
each tool's own ONNX file in onnxruntime, mean ± deviation over seeds; *robust*: mean of corrupted and held-out
accuracy; milliseconds: batch 1, one thread, medians of CPU time, all files of a seed timed by turns. Differences are
paired by seed, mean ± standard error. SAM's radius is the one that validation chose for our float training.
"""


if __name__ == "__main__":
    sys.exit(main())
