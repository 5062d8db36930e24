"""The recipes of the tasks beside image classification, on the stand-in data that the project makes itself.

    python -m benchmarks.tasks [--quick] [--check] [--page] [--only NAME ...] [--seeds N ...]

Each is run as configs/ has it (W8A8) and at W4A8, pruned by a third, over three seeds (``--quick``: one seed and
shorter stages). A row says the metric of the float model as trained and of the exported file through onnxruntime, on
the test part, the held-out domain and the corrupted copies. A run that is finished is kept in the results file and not
repeated; both bit widths begin with the same trained and pruned network. Targets: every certificate holds, and
``verify`` repeats it; at least a quarter of the multiply-accumulates is gone; at W8A8 the file is at most 3 points of a
share, or a quarter of an error, worse on test than the float model. The page docs/results/tasks.md is written from the
results (``--page`` does only that).
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks._common import RESULTS, arguments, finish
from flatcompress import Pipeline, onnx_export
from flatcompress.pipeline import Result
from flatcompress.recipe import identity

ROOT = Path(__file__).parent.parent
CONFIGS, PAGE = ROOT / "configs", ROOT / "docs" / "results" / "tasks.md"
RECIPES = (
    *("task-images", "task-heartbeats", "task-autoencoder", "task-keywords", "task-text", "task-person"),
    *("task-unet", "task-detector", "task-regression"),
)
BITS = ((8, 8), (4, 8))
QUICK = ["stages.0.train.epochs=4", "stages.1.prune.epochs=3", "stages.2.quantize.epochs=2"]
SMALL = {
    "task-regression": ["data.train_count=400", "data.test_count=100"],
    "task-keywords": ["data.train_count=180", "data.test_count=48"],
    "task-text": ["data.train_count=240", "data.test_count=60"],
    "task-person": ["data.train_count=240", "data.test_count=60", "data.size=24"],
    "task-detector": ["data.train_count=240", "data.test_count=60", "data.val_count=40", "data.size=32"],
    "task-unet": ["data.train_count=160", "data.test_count=60", "data.size=24"],
}
PARTS = {"test": "test", "held_out": "held-out", "corrupted": "corrupted"}


def metrics(row: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Every metric of a ledger's row, by name and part."""
    return row.get("metrics") or {"accuracy": row["accuracy"]}


def measured(
    recipe: str, bits: tuple[int, int], seed: int, folder: Path, result: Result, seconds: float
) -> dict[str, Any]:
    """What is kept of one run, as plain data."""
    first, last, certificate = result.ledger[0], result.ledger[-1], result.certificate or {}
    chosen = first.get("metric") or {"name": "accuracy", "higher": True, "share": True}
    again = onnx_export.verify(folder)
    return {
        "recipe": recipe.removeprefix("task-"),
        "bits": f"W{bits[0]}A{bits[1]}",
        "seed": seed,
        "chosen": chosen,
        "float": metrics(first),
        "file": metrics(last),
        "macs": [first["macs"], last["macs"]],
        "bytes": [first["bytes"], last["bytes"]],
        "processor_seconds": round(seconds, 1),
        "holds": bool(certificate.get("holds")),
        "verified": bool(again.holds),
        "failures": [*map(str, certificate.get("failures") or []), *map(str, again.failures)],
    }


def wanted_of(recipe: str, seed: int, quick: bool) -> dict[str, tuple[tuple[int, int], Pipeline]]:
    """Bits and pipeline of the runs of one recipe and seed, by key: what is kept under another one is out of date."""
    found = {}
    for bits in BITS:
        settings = [f"stages.2.quantize.{kind}_bits={b}" for kind, b in zip(("weight", "activation"), bits)]
        pipeline = Pipeline.from_yaml(CONFIGS / f"{recipe}.yaml", [*changes(recipe, seed, quick), *settings])
        found[f"{recipe} {bits} {seed} {identity.digest(pipeline.recipe)[:12]}"] = (bits, pipeline)
    return found


def changes(recipe: str, seed: int, quick: bool) -> list[str]:
    """What a run changes in its recipe."""
    return [f"seed={seed}", *(QUICK + SMALL.get(recipe, []) if quick else [])]


def runs_of(recipe: str, seed: int, quick: bool, kept: dict[str, Any], keep: Callable[[], None]) -> dict[str, Any]:
    """The runs of one recipe and seed, by key; those that are not in ``kept`` are made, and kept one by one.

    Training and pruning are done once for all bit widths, and counted in the seconds of the first.
    """
    wanted = wanted_of(recipe, seed, quick)
    missing = {key: found for key, found in wanted.items() if key not in kept}
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            begun, start = Path(folder) / "begun", time.process_time()
            whole = Pipeline.from_yaml(CONFIGS / f"{recipe}.yaml", changes(recipe, seed, quick)).recipe
            Pipeline.from_recipe(whole.model_copy(update={"stages": whole.stages[:2]})).run(begun)
            for key, (bits, pipeline) in missing.items():
                here = Path(folder) / f"{bits[0]}-{bits[1]}"
                shutil.copytree(begun, here)
                result = pipeline.run(here)
                kept[key] = measured(recipe, bits, seed, here, result, time.process_time() - start)
                start = time.process_time()
                keep()
    return {key: kept[key] for key in wanted}


def missed(run: dict[str, Any], strict: bool) -> list[str]:
    """The targets that one run misses; ``strict``: the metric's too, for which short stages are too short."""
    where, found = f"{run['recipe']} {run['bits']} seed {run['seed']}", []
    if not (run["holds"] and run["verified"]):
        found.append(f"{where}: the certificate does not hold: {run['failures']}")
    before, after = run["macs"]
    if after > 0.75 * before:
        found.append(f"{where}: {after} of {before} multiply-accumulates are left")
    chosen = run["chosen"]
    before, after = (run[which][chosen["name"]]["test"] or 0.0 for which in ("float", "file"))
    lost = before - after if chosen["higher"] else after - before
    if run["bits"] == "W8A8" and strict and lost > (0.03 if chosen["share"] else 0.25 * before):
        found.append(f"{where}: {chosen['name']} {before:.4f} became {after:.4f}")
    return found


def shown(values: Sequence[float | None]) -> str:
    """Mean and standard deviation over the seeds; a dash for what was not measured."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    return f"{statistics.mean(known):.3f}" + (f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else "")


def table_of(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per recipe, bit width and metric."""
    rows = []
    for recipe, bits in dict.fromkeys((run["recipe"], run["bits"]) for run in runs):
        some = [run for run in runs if (run["recipe"], run["bits"]) == (recipe, bits)]
        for name in some[0]["float"]:
            figures = {
                f"{said} {which}": shown([run[which][name][part] for run in some])
                for part, said in PARTS.items()
                for which in ("float", "file")
            }
            macs = statistics.mean(run["macs"][1] / run["macs"][0] for run in some)
            size = statistics.mean(run["bytes"][1] / run["bytes"][0] for run in some)
            held = f"{sum(run['holds'] and run['verified'] for run in some)} of {len(some)}"
            rows.append(
                {"recipe": recipe, "bits": bits, "metric": name, **figures}
                | {"MACs left": f"{macs:.2f}", "bytes left": f"{size:.3f}", "certified": held}
            )
    return rows


def page(
    rows: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]], failures: Sequence[str], missing: Sequence[str]
) -> str:
    """The page: what was run, the table, what was missed, what is still to be run."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[c]) for c in columns) + " |" for row in rows]
    seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs}))
    seconds = statistics.median(run["processor_seconds"] for run in runs)
    still = f"Not run yet: {', '.join(missing)}." if missing else "Every recipe was run."
    verdict = "\n".join(f"- {failure}" for failure in failures) or "None."
    return f"""# Tasks

`python -m benchmarks.tasks`: the recipes `configs/task-*.yaml` on the stand-in data that the project makes itself,
seeds {seeds} (mean ± standard deviation; the last column says how many runs a row is of). *float* is the network as
trained; *file* is the exported ONNX file in onnxruntime, after a third of the channels was pruned and weights and
activations were quantized. *held-out* is a domain that was never trained or selected on, *corrupted* the mean over
corrupted copies of the test part. MAE, RMSE and squared error are better when lower, everything else when higher.
Certified: the certificate holds and `verify` repeats it.

{chr(10).join(lines)}

The stand-ins are drawn or synthesised and easy on their own test part; what is hard is the held-out domain, for the
float network as for the file.

{still} A run takes {seconds:.0f} seconds of one processor (the median); what is finished is not repeated, so the same
command goes on where it was stopped.

The U-Net's images are jittered. Without that brightness alone tells ground from shapes, the threshold lies anywhere in
the gap between the two, and the unseen domain's brighter ground lies in that gap: its mean IoU was then that of a
constant answer or worse, and moved with every further epoch, whether anything was quantized or not.

Targets missed:

{verdict}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the results file and the page; returns the exit code."""
    own = ArgumentParser(add_help=False)
    own.add_argument("--page", action="store_true", help="only write the page of what is there")
    own.add_argument("--only", nargs="*", default=[], help="names of recipes, such as text unet")
    own.add_argument("--seeds", nargs="*", type=int, default=None)
    given, rest = own.parse_known_args(sys.argv[1:] if argv is None else argv)
    options: Namespace = arguments(__doc__, rest)
    path = RESULTS / f"tasks{'-quick' if options.quick else ''}.json"
    kept: dict[str, Any] = json.loads(path.read_text()).get("runs", {}) if path.exists() else {}
    recipes = [recipe for recipe in RECIPES if not given.only or recipe.removeprefix("task-") in given.only]
    seeds = given.seeds or range(1 if options.quick else 3)
    code = 0
    for seed in [] if given.page else seeds:
        for recipe in recipes:
            runs_of(recipe, seed, options.quick, kept, lambda: keep(path, kept))
            code = report(kept, options)
    return report(kept, options) if given.page else code


def report(kept: dict[str, Any], options: Namespace) -> int:
    """The table, the results file and the page of the runs that belong to today's recipes; the exit code."""
    seeds = range(1 if options.quick else 3)
    keys = [key for recipe in RECIPES for seed in seeds for key in wanted_of(recipe, seed, options.quick)]
    runs = [kept[key] for key in keys if key in kept]
    missing = [recipe.removeprefix("task-") for recipe in RECIPES
               if not any(run["recipe"] == recipe.removeprefix("task-") for run in runs)]  # fmt: skip
    failures = problems(runs, options)
    code = finish("tasks", table_of(runs), failures, options, runs=kept)
    if not options.quick and runs:
        PAGE.write_text(page(table_of(runs), runs, failures, missing))
    return code


def keep(path: Path, runs: dict[str, Any]) -> None:
    """Write the runs so far: one that is stopped goes on from here."""
    found = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**found, "runs": runs}, indent=1) + "\n")


def problems(runs: Sequence[dict[str, Any]], options: Namespace) -> list[str]:
    """Every target that is missed."""
    return [text for run in runs for text in missed(run, strict=not options.quick)]


if __name__ == "__main__":
    sys.exit(main())
