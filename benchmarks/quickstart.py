"""The quickstart recipe over seeds and arithmetics: what each stage costs and keeps, wherever it is run.

    python -m benchmarks.quickstart [--quick] [--check] [--seeds N] [--against CHECKOUT]

Every seed is run twice, each time in a process of its own: with the processor's own instructions, and with the most
generic code of torch, oneDNN and MKL (``GENERIC``), whose sums round differently. Mean and standard deviation over all
of these runs; model selection on the training domains' validation split. Finished runs are kept in
benchmarks/results/quickstart_runs.json, so an interrupted benchmark goes on, and what another processor computed can
be added.

Targets: at least half of the multiply-accumulates pruned, W4A4, exported accuracy within 2 points of the float
model's on the test split and within 4 points on the held-out domain in every run, the multiply-accumulates of all runs
within 15 % of one another, the file at least 8 times smaller than the float model's own ONNX file, every certificate
holds. With ``--against``, a folder with another commit's source (4004874), nothing but time is measured: both run their
own quickstart, seed 0, each time in a process of its own, in turns, on one thread. Target: this one takes at most 0.8
of the other's processor time, as the median of three pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import _against
from benchmarks._common import RESULTS, arguments, finish, ratio
from flatcompress import Pipeline
from flatcompress.environment import processor

RECIPE = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
RAW = RESULTS / "quickstart_runs.json"
QUICK = ["stages.0.train.epochs=3", "stages.1.prune.epochs=3", "stages.2.quantize.epochs=2"]
ACCURACIES = ("test", "held_out", "corrupted")
GENERIC = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
ARITHMETICS: dict[str, dict[str, str]] = {"native": {}, "generic": GENERIC}


MOST = 0.8  # of the other checkout's processor time
# What a side of --against runs: the whole program each time, as a user starts it.
SIDE = """
import resource, subprocess, sys, tempfile
for line in sys.stdin:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "flatcompress", "run", "configs/quickstart.yaml"]
        command += ["--set", f"output_dir={folder}", *sys.argv[1:]]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, flush=True)
"""


def against(options: argparse.Namespace) -> int:
    """Time this checkout's quickstart and the other's; the exit code."""
    given = [part for key in QUICK for part in ("--set", key)] if options.quick else []
    rounds = 1 if options.quick else 3
    here, there = _against.seconds(SIDE, options.against, rounds, 1, given, given, warmup=0)
    share = ratio(here, there)
    rows = [{"side": name, "seconds": statistics.median(of)} for name, of in (("here", here), ("there", there))]
    missed = [f"the quickstart takes {share:.2f} of the other's processor time, target {MOST}"] if share > MOST else []
    return finish("quickstart_against", rows, missed, options, share=share, here=here, there=there)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation as percent."""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def one_run(seed: int, arithmetic: str, overrides: Sequence[str]) -> dict[str, Any]:
    """One run of the recipe here, as plain data: its ledger and what its certificate says."""
    with tempfile.TemporaryDirectory() as folder:
        result = Pipeline.from_yaml(RECIPE, [f"seed={seed}", *overrides]).run(folder)
    certificate = result.certificate or {}
    keys = ("stage", "method", "accuracy", "params", "macs", "bytes", "passes", "seconds")
    return {
        "seed": seed,
        "arithmetic": arithmetic,
        "processor": processor(),
        "stages": [{k: row.get(k) for k in keys} for row in result.ledger],
        "holds": bool(certificate.get("holds")),
        "failures": certificate.get("failures"),
        "file_bytes": certificate["file"]["bytes"],
        "theoretical_bytes": certificate["size"]["theoretical_bytes"],
        "times_smaller": round(certificate["float"]["smaller"], 2),
        "times_faster": round(certificate["float"]["faster"], 2),
        "largest_error_steps": certificate["parity"]["optimized"]["largest_error_steps"],
        "equal_argmax": certificate["parity"]["optimized"]["equal_argmax"],
    }


def in_own_process(seed: int, arithmetic: str, quick: bool) -> dict[str, Any]:
    """`one_run` in a fresh interpreter: the libraries read their instruction set when they are loaded."""
    command = [sys.executable, "-m", "benchmarks.quickstart", "--one", str(seed), arithmetic]
    environment = {**os.environ, **ARITHMETICS[arithmetic]}
    if quick:
        command.append("--quick")
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def runs_of(seeds: int, quick: bool) -> list[dict[str, Any]]:
    """Every run, those kept from before first; each new one is kept at once."""
    known: list[dict[str, Any]] = [] if quick or not RAW.exists() else json.loads(RAW.read_text())
    for seed in range(seeds):
        for arithmetic in ARITHMETICS:
            if any((r["seed"], r["arithmetic"], r["processor"]) == (seed, arithmetic, processor()) for r in known):
                continue
            known.append(in_own_process(seed, arithmetic, quick))
            if not quick:
                RAW.write_text(json.dumps(known, indent=1) + "\n")
    return known


def stage_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One stage over the runs."""
    first = rows[0]
    return {
        "stage": first["stage"],
        "method": first["method"],
        **{f"{k} %": spread([r["accuracy"][k] for r in rows]) for k in ACCURACIES},
        "params": round(statistics.mean(r["params"] for r in rows)),
        "MACs": round(statistics.mean(r["macs"] for r in rows)),
        "bytes": round(statistics.mean(r["bytes"] for r in rows)),
        "passes": first["passes"],
        "seconds": round(statistics.mean(r["seconds"] for r in rows), 1),
    }


def missed(run: dict[str, Any]) -> list[str]:
    """The targets that one run misses."""
    name = f"seed {run['seed']}, {run['arithmetic']}, {run['processor']}"
    rows = {r["stage"]: r for r in run["stages"]}
    before, after = rows["train"]["accuracy"], rows["export"]["accuracy"]
    found = []
    if not run["holds"]:
        found.append(f"{name}: the certificate does not hold: {run['failures']}")
    if rows["prune"]["macs"] > 0.5 * rows["train"]["macs"]:
        found.append(f"{name}: {rows['prune']['macs']} of {rows['train']['macs']} MACs are left")
    for part, points in (("test", 2), ("held_out", 4)):
        lost = 100 * (before[part] - after[part])
        if lost > points:
            found.append(f"{name}: {lost:.1f} points of {part} accuracy lost, {points} allowed")
    if run["times_smaller"] < 8:
        found.append(f"{name}: only {run['times_smaller']:.1f} times smaller")
    return found


def apart(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Where the runs' multiply-accumulates lie further than 15 % apart."""
    macs = [next(r["macs"] for r in run["stages"] if r["stage"] == "prune") for run in runs]
    wide = max(macs) > 1.15 * min(macs)
    return [f"multiply-accumulates of {min(macs):,} to {max(macs):,}: more than 15 % apart"] if wide else []


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("SEED", "ARITHMETIC"), help="one run here, as a line of JSON")
    own, rest = parser.parse_known_args(argv)
    options = arguments(__doc__, rest, _against.option)
    if options.against is not None:
        return against(options)
    if own.one:
        print(json.dumps(one_run(int(own.one[0]), own.one[1], QUICK if options.quick else [])))
        return 0
    runs = runs_of(1 if options.quick else own.seeds, options.quick)
    failures = [sentence for run in runs for sentence in missed(run)] + apart(runs)
    rows = [stage_row([r["stages"][i] for r in runs]) for i in range(len(runs[0]["stages"]))]
    each = ("seed", "arithmetic", "processor", "file_bytes", "theoretical_bytes", "times_smaller", "times_faster",
            "largest_error_steps", "equal_argmax")  # fmt: skip
    summary = {key: [run[key] for run in runs] for key in each}
    summary["expected"] = expected(runs)
    for key, value in summary.items():
        print(f"{key}: {value}")
    return finish("quickstart", rows, failures, options, summary=summary)


def expected(runs: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Mean and standard deviation of the exported file's accuracies, as `expected` of configs/quickstart.yaml."""
    last = [run["stages"][-1]["accuracy"] for run in runs]
    of = {key: [accuracy[key] for accuracy in last] for key in ACCURACIES}
    return {
        k: [round(statistics.mean(v), 4), round(statistics.stdev(v) if len(v) > 1 else 0.0, 4)] for k, v in of.items()
    }


if __name__ == "__main__":
    sys.exit(main())
