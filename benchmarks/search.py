"""Does a search beat the recipes that were written by hand, at equal training passes a point?

    python -m benchmarks.search [--quick] [--check] [--restart] [--kept] [--jobs N] [--seeds 0 1 2]

Styled shapes and the network of `benchmarks.peers`. By hand: that benchmark's six recipes of flatcompress's, with the
style *sketch* held out. Found: `flatcompress search` over bits of every layer, channels of every group, pruning and
float methods, their radii and averages, on the other three styles with *cartoon* held out, so that nothing was chosen
on sketch; then the recipes of its front are run with sketch held out, like those by hand. The float stage is trained
in full at every fidelity and shared by the points that agree in it (`full_stages`): after one epoch from initial
weights every point is at chance, and a ranking is noise. A point counts only with at most as many forward and backward
passes as the dearest recipe by hand. Hypervolume is `benchmarks.peers`': the area under the front of robust accuracy
(mean of corrupted and held out) against bytes, and against milliseconds (interleaved medians, packed files), as a share
of the box from nothing to chance and the float file's bytes, or twice its milliseconds.

Goes on row by row where it was stopped (also within a search); `--kept` prints what is there. Some hours on one core:
3 seeds x (60 points, 20 of them in full, + 7 recipes + the front).

Targets
  1. hypervolume of the search above that by hand by more than 10 %, against bytes, mean over seeds.
  2. the same against milliseconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import _common, _pareto
from benchmarks._peer_rows import START_EPOCHS, own
from benchmarks.domain_generalization import MODEL, RHO, quantize, train
from benchmarks.robust_pruning import DATA, prune
from flatcompress import Pipeline
from flatcompress.onnx_export.runtime import latency
from flatcompress.recipe import load_recipe, parse_recipe
from flatcompress.search.driver import run_search
from flatcompress.search.spec import parse_search
from flatcompress.sweep.executor import LocalPool
from flatcompress.sweep.pool import stderr
from flatcompress.sweep.spec import slug

NAME = "search"
UNSEEN, INNER = "sketch", "cartoon"
SOURCES = ["photo", "art"]
CHANCE = 1 / 12
MORE = 1.10
EXPORT = {"export": {"profile": "packed", "latency": False}}


def data(quick: bool) -> dict[str, Any]:
    """What the recipes by hand are trained on."""
    few = {"train_count": 96, "corrupted_count": 48} if quick else {}
    return {**DATA, "held_out": UNSEEN, **few}


def recipe(stages: Sequence[dict[str, Any]], seed: int, quick: bool, **more: Any) -> dict[str, Any]:
    """A recipe of this benchmark."""
    return {"device": "cpu", "threads": 1, "seed": seed, "data": {**data(quick), **more}, "model": MODEL,
            "stages": list(stages)}  # fmt: skip


def by_hand(epochs: int, quick: bool) -> dict[str, list[dict[str, Any]]]:
    """Stages of `benchmarks.peers`' own rows, the float start written out where they have none."""
    start = train("none", 1 if quick else START_EPOCHS)
    found = {"float ERM": [start, {"export": {"profile": "float32", "latency": False}}]}
    for row in own(epochs, quick):
        stages = json.loads(row.flags[1])
        found[row.name] = stages if "train" in stages[0] else [start, *stages]
    return found


def space(quick: bool) -> dict[str, Any]:
    """What the search may choose."""
    few = {
        "stages.1.prune.ratios": {"per_group": [0.0, 0.5]},
        "stages.2.quantize.bits": {"per_layer": [2, 4, 8]},
    }
    if quick:
        return few
    return {
        "stages.0.train.method": {"choice": ["sagm", "sam"]},
        "stages.0.train.rho": {"choice": [RHO / 2, RHO, 2 * RHO]},
        "stages.0.train.averaging": {"choice": ["none", "swad", "ema"]},
        "stages.1.prune.method": {"choice": ["taylor", "adasap"]},
        "stages.1.prune.ratios": {"per_group": [0.0, 0.25, 0.5, 0.75]},
        "stages.2.quantize.distill": {"choice": [0.0, 1.0]},
        "stages.2.quantize.bits": {"per_layer": [2, 3, 4, 6, 8]},
        "stages.2.quantize.activation_bits": {"choice": [4, 6, 8]},
    }


def searched(seed: int, epochs: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Search on the styles but the unseen one; the recipes of the front, and what was spent."""
    quick = options.quick
    third = max(1, epochs // 3)
    cut = prune("taylor", 0.5, third)
    del cut["prune"]["macs"]
    cut["prune"] |= {"ratio": 0.5, "round_to": None}
    stages = [train("sagm", START_EPOCHS + third, rho=RHO, averaging="none"), cut,
              quantize("lsq", 4, 2 * third, start="post_training", distill=1.0)]  # fmt: skip
    if quick:
        stages[0]["train"]["epochs"] = 1
    sizes = {"n_trials": 6, "warm_start": 3} if quick else {"n_trials": 60, "warm_start": 12, "reduction_factor": 3}
    sizes |= {"full_stages": 1, "fidelities": ["post_training", "full"]}
    found = parse_search({
        "name": f"seed-{seed}", "output_dir": str(folder), "seed": seed, "jobs": options.jobs, "space": space(quick),
        "recipe": recipe(stages, seed, quick, held_out=INNER, domains=SOURCES), **sizes,
    })  # fmt: skip
    front = run_search(found, stderr, lambda: LocalPool(found.folder, options.jobs, stderr))
    front.write()
    spent = sum(m.get("passes") or 0 for _, m in front.others) + sum(p.measures["passes"] or 0 for p in front.points)
    return {"recipes": [str(found.folder / p.file) for p in front.points], "passes of full trainings": spent,
            "counts": front.counts}  # fmt: skip


def trained(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a recipe with an export at its end (or go on with it) and say what its file does."""
    result = Pipeline.from_recipe(parse_recipe(raw, "recipe")).run(folder)
    last = result.ledger[-1]
    accuracy = last["accuracy"]
    return {
        "robust": (accuracy["held_out"] + accuracy["corrupted"]) / 2, "held out": accuracy["held_out"],
        "corrupted": accuracy["corrupted"], "bytes": last["bytes"], "file": str(result.onnx),
        "passes": sum(row["passes"] or 0 for row in result.ledger),
    }  # fmt: skip


def on_unseen(path: str, seed: int, quick: bool) -> dict[str, Any]:
    """A found recipe with the unseen style held out, and exported."""
    raw = load_recipe(path).to_dict()
    raw["data"] = recipe([], seed, quick)["data"]
    return {**raw, "seed": seed, "stages": [*raw["stages"], EXPORT]}


def measured(store: _common.Kept, seed: int, epochs: int, options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Every point of one seed by name; whatever was not run is left out."""
    points: dict[str, Any] = {}
    for name, stages in by_hand(epochs, options.quick).items():
        raw, folder = recipe(stages, seed, options.quick), root / f"hand-{seed}" / slug(name)
        points[name] = store.get(f"{name}, seed {seed}", lambda raw=raw, folder=folder: trained(raw, folder))
    found = store.get(f"search, seed {seed}", lambda: searched(seed, epochs, options, root))
    for path in (found or {}).get("recipes", []):
        name, folder = Path(path).stem, root / f"found-{seed}" / Path(path).stem
        raw = on_unseen(path, seed, options.quick) if options.kept is False else None
        points[name] = store.get(f"{name}, seed {seed}", lambda raw=raw, folder=folder: trained(raw, folder))
    points = {name: point for name, point in points.items() if point is not None}
    files = {name: Path(point["file"]) for name, point in points.items()}
    times = store.get(f"milliseconds, seed {seed}", lambda: timed(files, 11 if options.quick else 51))
    return {name: {**point, "ms": (times or {}).get(name), "seed": seed} for name, point in points.items()}


def timed(files: dict[str, Path], rounds: int) -> dict[str, float]:
    """Milliseconds of processor time of every file, interleaved."""
    found = latency.measure(files, threads=1, runs=rounds, clock=time.process_time)
    return {name: row["median_ms"] for name, row in found.items()}


def volumes(points: dict[str, Any]) -> dict[str, float]:
    """Hypervolumes by hand and of the search, against bytes and milliseconds, of one seed."""
    start = points["float ERM"]
    most = max(p["passes"] for n, p in points.items() if not n.startswith("trial-"))
    limits, found = {"bytes": start["bytes"], "ms": 2 * start["ms"]}, {}
    for cost, limit in limits.items():
        for who in ("hand", "search"):
            mine = [
                (p[cost] / limit, p["robust"]) for n, p in points.items()
                if n.startswith("trial-") == (who == "search") and p["passes"] <= most
            ]  # fmt: skip
            found[f"{who}, {cost}"] = _pareto.hypervolume(mine, (1.0, CHANCE)) / (1 - CHANCE)
    return found


def verdict(by_seed: dict[int, dict[str, float]]) -> list[str]:
    """The targets that are missed."""
    missed = []
    for number, cost in enumerate(("bytes", "ms"), 1):
        hand, search = (statistics.fmean(v[f"{who}, {cost}"] for v in by_seed.values()) for who in ("hand", "search"))
        if search <= MORE * hand:
            missed.append(f"target {number}: hypervolume against {cost} {search:.3f}, by hand {hand:.3f}: "
                          f"{search / hand - 1 if hand else 0:+.0%}, wanted more than {MORE - 1:+.0%}")  # fmt: skip
    return missed


def own_arguments(parser: argparse.ArgumentParser) -> None:
    """What this benchmark has beside the usual options."""
    _common.resumable(parser)
    parser.add_argument("--jobs", type=int, default=1, help="runs of the search at the same time (default 1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="seeds (default 0 1 2)")
    parser.add_argument("--output", default="runs/benchmarks", help="where the runs go; finished ones are not repeated")


def main(argv: Sequence[str] | None = None) -> int:
    options = _common.arguments(__doc__, argv, own_arguments)
    store = _common.kept(NAME, options)
    root = Path(options.output) / f"{NAME}{'-quick' if options.quick else ''}"
    if options.restart and root.exists():
        shutil.rmtree(root)
    seeds, epochs = options.seeds or ([0] if options.quick else [0, 1, 2]), 3 if options.quick else 12
    rows: list[dict[str, Any]] = []
    by_seed: dict[int, dict[str, float]] = {}
    for seed in seeds:
        points = measured(store, seed, epochs, options, root)
        rows += [{"row": n, **{k: v for k, v in p.items() if k != "file"}} for n, p in points.items()]
        if any(n.startswith("trial-") for n in points) and all(p["ms"] is not None for p in points.values()):
            by_seed[seed] = volumes(points)
    failures = verdict(by_seed) if by_seed else ["nothing to compare yet: no seed has its recipes, front and times"]
    spent = {seed: store.values.get(f"search, seed {seed}") for seed in seeds}
    return _common.finish(NAME, rows, failures, options, hypervolume=by_seed, searches=spent)


if __name__ == "__main__":
    sys.exit(main())
