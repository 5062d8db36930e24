"""The recipes of the tasks beside image classification, on the stand-in data that the project makes itself.

Each is run as configs/ has it (W8A8) and at W4A4, pruned by a third, over three seeds (``--quick``: one seed and
shorter stages). A row says the metric of the float model and of the exported file on the test part, the held-out domain
and the corrupted copies. Targets: every certificate holds, and ``verify`` repeats it; at least a quarter of the
multiply-accumulates is gone; at W8A8 the file is at most 3 points of a share, or a quarter of an error, worse on test
than the float model.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._common import arguments, finish
from flatcompress import Pipeline, onnx_export
from flatcompress.pipeline import Result

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = ("task-regression", "task-heartbeats", "task-unet", "task-autoencoder")
QUICK = ["stages.0.train.epochs=4", "stages.1.prune.epochs=3", "stages.2.quantize.epochs=2"]
SMALL = {
    "task-regression": ["data.train_count=400", "data.test_count=100"],
    "task-unet": ["data.train_count=160", "data.test_count=60", "data.size=24"],
}
PARTS = ("test", "held_out", "corrupted")


def metrics(row: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Every metric of a ledger's row, by name and part."""
    return row.get("metrics") or {"accuracy": row["accuracy"]}


def shown(values: Sequence[float | None]) -> str:
    """Mean and standard deviation over the seeds; a dash for what was not measured."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    return f"{statistics.mean(known):.3f}" + (f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else "")


def row(recipe: str, bits: int, name: str, results: Sequence[Result]) -> dict[str, Any]:
    """One metric of one recipe: before (float, as trained) and after (the file through onnxruntime)."""
    both = {"float": [r.ledger[0] for r in results], "file": [r.ledger[-1] for r in results]}
    figures = {
        f"{part} {which}": shown([metrics(ledger)[name][part] for ledger in rows])
        for part in PARTS
        for which, rows in both.items()
    }
    holds = sum(bool((r.certificate or {}).get("holds")) for r in results)
    size = round(statistics.mean(r.ledger[-1]["bytes"] for r in results))
    return {
        "recipe": recipe.removeprefix("task-"),
        "bits": f"W{bits}A{bits}",
        "metric": name,
        **figures,
        "bytes": size,
        "holds": f"{holds} of {len(results)}",
    }


def missed(recipe: str, bits: int, seed: int, result: Result, strict: bool) -> list[str]:
    """The targets that one run misses; ``strict``: the metric's too, for which short stages are too short."""
    where, found = f"{recipe} W{bits}A{bits} seed {seed}", []
    certificate = result.certificate or {}
    if not certificate.get("holds"):
        found.append(f"{where}: the certificate does not hold: {certificate.get('failures')}")
    again = onnx_export.verify(result.folder)
    if not again.holds:
        found.append(f"{where}: verify: {again.failures}")
    first, last = result.ledger[0], result.ledger[-1]
    if last["macs"] > 0.75 * first["macs"]:
        found.append(f"{where}: {last['macs']} of {first['macs']} multiply-accumulates are left")
    chosen = first.get("metric") or {"name": "accuracy", "higher": True, "share": True}
    before, after = (metrics(r)[chosen["name"]]["test"] or 0.0 for r in (first, last))
    lost = before - after if chosen["higher"] else after - before
    if bits == 8 and strict and lost > (0.03 if chosen["share"] else 0.25 * before):
        found.append(f"{where}: {chosen['name']} {before:.4f} became {after:.4f}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the results file; returns the exit code."""
    options = arguments(__doc__, argv)
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for recipe in RECIPES:
        for bits in (8, 4):
            results = []
            for seed in range(1 if options.quick else 3):
                changed = [*QUICK, *SMALL.get(recipe, [])] if options.quick else []
                settings = [f"seed={seed}", f"stages.2.quantize.weight_bits={bits}",
                            f"stages.2.quantize.activation_bits={bits}", *changed]  # fmt: skip
                with tempfile.TemporaryDirectory() as folder:
                    made = Pipeline.from_yaml(CONFIGS / f"{recipe}.yaml", settings).run(Path(folder) / "run")
                    failures += missed(recipe, bits, seed, made, strict=not options.quick)
                results.append(made)
            rows += [row(recipe, bits, name, results) for name in metrics(results[0].ledger[0])]
    return finish("tasks", rows, failures, options)


if __name__ == "__main__":
    sys.exit(main())
