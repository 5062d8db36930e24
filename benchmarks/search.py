"""Does a search beat the recipes that were written by hand, at equal training passes a point?

    python -m benchmarks.search [--quick] [--check] [--restart] [--kept] [--jobs N] [--seeds 0 1 2]

Styled shapes and the network of `benchmarks.peers`. By hand: that benchmark's six recipes of flatcompress's, with the
style *sketch* held out. Found: `flatcompress search` over bits of every layer, channels of every group, low-bit
methods, radii and learning rates of all stages, on the other three styles with *cartoon* held out, so that nothing was
chosen on sketch; it starts from the dearest recipe by hand. Then the recipes of its front are run with sketch held out,
like those by hand. The float stage is trained once for the points that agree in it (`full_stages`). A point counts only
with at most as many forward and backward passes as the dearest recipe by hand. Hypervolume is `benchmarks.peers`': the
area under the front of robust accuracy (mean of corrupted and held out) against bytes, and against milliseconds
(interleaved medians, packed files), as a share of the box from nothing to chance and the float file's bytes, or twice
its milliseconds. The control, in neither, is the dearest recipe by hand at the learning rates of the most robust point
found: what of the difference is learning rates, and what is left for shapes and methods.

How the search was chosen: an earlier one (60 points, post-training estimates first, other methods and no learning
rates) was run on these seeds, 8 % by bytes and 6 % by milliseconds. From its kept rows come three decisions: points are
trained in full (between points of like bytes the estimates ranked by 0.08 to 0.5, Spearman, and cost a third), 8-bit
activations alone (4-bit ones take 5 to 10 % more milliseconds here, which the search's own `ms` does not see), flat
low-bit methods in the space. Learning rates, and which ones, were found on seed 10 with cartoon held out.

Writes docs/results/search.md.

Goes on row by row where it was stopped (also within a search); `--kept` prints what is there. About an hour on one
core: 3 seeds x (30 points + 7 recipes + the front).

Targets
  1. hypervolume of the search above that by hand by more than 10 %, against bytes, mean over seeds.
  2. the same against milliseconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import _common, _pareto, _search_page
from benchmarks._peer_rows import START_EPOCHS, own
from benchmarks.domain_generalization import MODEL, QAT_RHO, RHO, K, quantize, train
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
CONTROL = "control: the dearest by hand, found learning rates"
CHANCE = 1 / 12
PAGE = Path(__file__).parent.parent / "docs" / "results" / "search.md"
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


def space(epochs: int, quick: bool) -> dict[str, Any]:
    """What the search may choose."""
    few = {
        "stages.1.prune.ratios": {"per_group": [0.0, 0.5]},
        "stages.2.quantize.bits": {"per_layer": [2, 4, 8]},
    }
    if quick:
        return few
    return {
        "stages.0.train.rho": {"choice": [RHO, 2 * RHO]},
        "stages.0.train.optimizer.lr": {"choice": [3e-3, 6e-3, 1.2e-2, 2.4e-2]},
        "stages.1.prune.ratios": {"per_group": [0.0, 0.25, 0.5, 0.75]},
        "stages.1.prune.rho_max": {"choice": [1.0, 2.0, 4.0]},
        "stages.1.prune.optimizer.lr": {"choice": [1.5e-3, 3e-3, 6e-3, 1.2e-2]},
        "stages.2.quantize.bits": {"per_layer": [2, 3, 4, 6, 8]},
        "quantizer": {"together": quantizers(epochs)},
        "stages.2.quantize.optimizer.lr": {"choice": [1e-3, 2e-3, 4e-3, 8e-3]},
    }


def quantizers(epochs: int) -> list[dict[str, Any]]:
    """Low-bit methods, each with the epochs that make as many passes."""
    at, last = "stages.2.quantize", epochs // 3
    flat = {f"{at}.epochs": last, f"{at}.rho": QAT_RHO}
    return [{f"{at}.method": "gaqat", **flat, f"{at}.K": K}, {f"{at}.method": "lsq_sagm", **flat},
            {f"{at}.method": "lsq", f"{at}.epochs": 2 * last}]  # fmt: skip


def starts(epochs: int, quick: bool) -> list[dict[str, Any]]:
    """Where a user would begin: the dearest recipe by hand, and it with LSQ+SAGM (channels by group, not MACs)."""
    shape = {"stages.1.prune.ratios": 0.5 if quick else 0.25, "stages.2.quantize.bits": 4}
    return [shape] if quick else [{**shape, "quantizer": setting} for setting in quantizers(epochs)[:2]]


def searched(seed: int, epochs: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Search on the styles but the unseen one; the recipes of the front, and what was spent."""
    quick = options.quick
    cut = prune("adasap", 0.5, epochs - epochs // 3)
    del cut["prune"]["macs"]
    cut["prune"] |= {"ratio": 0.5, "round_to": None}
    stages = [train("none", 1) if quick else train("sagm", START_EPOCHS, rho=RHO), cut,
              quantize("lsq", 4, 2 * (epochs // 3), activation_bits=8)]  # fmt: skip
    sizes: dict[str, Any] = {"n_trials": 30, "warm_start": 12, "fidelities": ["full"]}
    if quick:
        sizes = {"n_trials": 6, "warm_start": 3, "fidelities": ["post_training", "full"]}
    found = parse_search({
        "name": f"seed-{seed}", "output_dir": str(folder), "seed": seed, "jobs": options.jobs,
        "space": space(epochs, quick), "starts": starts(epochs, quick), "full_stages": 1,
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


def control(path: str, seed: int, epochs: int, quick: bool) -> dict[str, Any]:
    """The dearest recipe by hand at the learning rates of a found one."""
    stages = copy.deepcopy(list(by_hand(epochs, quick).values())[-1])
    rates = {next(iter(s)): next(iter(s.values()))["optimizer"]["lr"] for s in load_recipe(path).to_dict()["stages"]}
    for kind, keys in (next(iter(stage.items())) for stage in stages):
        if kind in rates:
            keys["optimizer"] = {**keys["optimizer"], "lr": rates[kind]}
    return recipe(stages, seed, quick)


def measured(store: _common.Kept, seed: int, epochs: int, options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Every point of one seed by name; whatever was not run is left out."""
    points: dict[str, Any] = {}
    for name, stages in by_hand(epochs, options.quick).items():
        raw, folder = recipe(stages, seed, options.quick), root / f"hand-{seed}" / slug(name)
        points[name] = store.get(f"{name}, seed {seed}", lambda raw=raw, folder=folder: trained(raw, folder))
    found = store.get(f"search, seed {seed}", lambda: searched(seed, epochs, options, root))
    paths = (found or {}).get("recipes", [])
    recipes = {Path(path).stem: lambda path=path: on_unseen(path, seed, options.quick) for path in paths}
    if paths:  # the front is by robust accuracy, from the best down
        recipes[CONTROL] = lambda: control(paths[0], seed, epochs, options.quick)
    for name, made in recipes.items():
        folder = root / f"found-{seed}" / slug(name)
        points[name] = store.get(f"{name}, seed {seed}", lambda made=made, folder=folder: trained(made(), folder))
    points = {name: point for name, point in points.items() if point is not None}
    files = {name: Path(point["file"]) for name, point in points.items()}
    times = store.get(f"milliseconds, seed {seed}", lambda: timed(files, 11 if options.quick else 51))
    return {name: {**point, "ms": (times or {}).get(name), "seed": seed} for name, point in points.items()}


def timed(files: dict[str, Path], rounds: int) -> dict[str, float]:
    """Milliseconds of processor time of every file, interleaved."""
    found = latency.measure(files, threads=1, runs=rounds, clock=time.process_time)
    return {name: row["median_ms"] for name, row in found.items()}


def volumes(points: dict[str, Any]) -> dict[str, float]:
    """Hypervolumes against bytes and milliseconds, of one seed: by hand, of the search, by hand with the control, and
    of as many points of the front as there are by hand, evenly along it.
    """
    start = points["float ERM"]
    most = max(p["passes"] for n, p in points.items() if not n.startswith("trial-"))
    limits, found = {"bytes": start["bytes"], "ms": 2 * start["ms"]}, {}
    search = [n for n in points if n.startswith("trial-")]
    retuned = [n for n in points if n not in search]
    hand = [n for n in retuned if n != CONTROL]
    many = [search[round(i * (len(search) - 1) / max(1, len(hand) - 1))] for i in range(len(hand))]
    groups = {"hand": hand, "search": search, "control": retuned, "as many": dict.fromkeys(many)}
    for cost, limit in limits.items():
        for who, names in groups.items():
            mine = [(points[n][cost] / limit, points[n]["robust"]) for n in names if points[n]["passes"] <= most]
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
    if len(by_seed) > 1 and not options.quick:
        PAGE.write_text(_search_page.page(rows, by_seed, spent, failures))
        PAGE.with_suffix(".svg").write_text(_search_page.plot(rows))
    return _common.finish(NAME, rows, failures, options, hypervolume=by_seed, searches=spent)


if __name__ == "__main__":
    sys.exit(main())
