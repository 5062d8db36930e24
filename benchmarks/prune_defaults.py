"""Which ranking and floor of the pruning stage keep a network alive, whatever the seed and the processor's rounding.

    python -m benchmarks.prune_defaults [--quick] [--check] [--seeds N] [--models NAME ...]

Each small built-in model is trained on rotated digits (a domain held out), then pruned by AdaSAP at the quickstart's
ratio with every candidate, from the same weights. A row is a model and a candidate over the seeds: accuracy on the
test split and the held-out domain against the float model's, the worst seed, the spread of the multiply-accumulates
and the narrowest layer. Finished rows are kept in benchmarks/results/prune_defaults.json under the arithmetic that
they ran with (``ATEN_CPU_CAPABILITY``), so a second run with another one is added beside them.

Target: the default candidate's worst held-out change is within 2 points of the best candidate's worst.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks._common import RESULTS, arguments, finish
from flatcompress import Pipeline

CANDIDATES: dict[str, dict[str, Any]] = {
    "global, floor 0.1": {"ranking": "global", "floor": 0.1},
    "global, floor 0.25": {"ranking": "global", "floor": 0.25},
    "global, floor 0.34": {"ranking": "global", "floor": 0.34},
    "isomorphic, floor 0.1": {"ranking": "isomorphic", "floor": 0.1},
    "isomorphic, floor 0.25": {"ranking": "isomorphic", "floor": 0.25},
    "uniform": {"ranking": "uniform"},
}
MODELS = ("resnet8", "ds_cnn", "mobilenet_v1_025")
EPOCHS = {"train": 4, "prune": 3}
RAW = RESULTS / "prune_defaults_runs.json"


def recipe(model: dict[str, Any], stage: dict[str, Any], seed: int) -> dict[str, Any]:
    """The quickstart's data and optimizer with one stage."""
    data = {"name": "rotated-digits", "held_out": "75", "batch_size": 64, "corruptions": "none"}
    return {"name": "defaults", "seed": seed, "device": "cpu", "threads": 1, "data": data, "model": model,
            "stages": [stage]}  # fmt: skip


def run(folder: Path, made: dict[str, Any]) -> Any:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(made))
    return Pipeline.from_yaml(folder / "recipe.yaml").run(folder / "run")


def of_seed(model: str, seed: int, epochs: dict[str, int]) -> list[dict[str, Any]]:
    """The float model and every candidate cut from it."""
    adamw = {"name": "adamw", "lr": 3e-3, "weight_decay": 1e-4}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stage = {"train": {"method": "sam", "rho": 0.05, "epochs": epochs["train"], "optimizer": adamw}}
        trained = run(folder / "train", recipe({"name": model}, stage, seed)).ledger[-1]
        weights = str(next((folder / "train" / "run").rglob("model.safetensors")))
        rows = []
        for number, (candidate, options) in enumerate(CANDIDATES.items()):
            stage = {"prune": {"method": "adasap", "ratio": 0.5, "epochs": epochs["prune"], **options}}
            found = run(folder / str(number), recipe({"name": model, "weights": weights}, stage, seed)).ledger[-1]
            rows.append({
                "arithmetic": arithmetic(), "model": model, "seed": seed, "candidate": candidate,
                "test": found["accuracy"]["test"], "held_out": found["accuracy"]["held_out"], "macs": found["macs"],
                "float_test": trained["accuracy"]["test"], "float_held_out": trained["accuracy"]["held_out"],
                "float_macs": trained["macs"],
            })  # fmt: skip
    return rows


def arithmetic() -> str:
    """What computes: the instruction set that torch was told to use, or the processor's own."""
    return os.environ.get("ATEN_CPU_CAPABILITY", torch.backends.cpu.get_cpu_capability().lower())


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One model and candidate over seeds and arithmetics."""
    change = [100 * (r["held_out"] - r["float_held_out"]) for r in rows]
    macs = [r["macs"] / r["float_macs"] for r in rows]
    error = statistics.stdev(change) / len(change) ** 0.5 if len(change) > 1 else 0.0
    return {
        "model": rows[0]["model"],
        "candidate": rows[0]["candidate"],
        "runs": len(rows),
        "held-out change, points": f"{statistics.mean(change):+.1f} (se {error:.1f})",
        "worst": round(min(change), 1),
        "test change": round(100 * statistics.mean(r["test"] - r["float_test"] for r in rows), 1),
        "MACs left %": round(100 * statistics.mean(macs), 1),
        "MACs, largest / smallest": round(max(macs) / min(macs), 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--models", nargs="*", default=list(MODELS), metavar="NAME")
    own, rest = parser.parse_known_args(argv)
    options = arguments(__doc__, rest)
    epochs = {"train": 2, "prune": 1} if options.quick else EPOCHS
    models, seeds = (["resnet8"], 1) if options.quick else (own.models, own.seeds)
    done = [] if options.quick or not RAW.exists() else json.loads(RAW.read_text())
    for model in models:
        for seed in range(seeds):
            if not any((r["arithmetic"], r["model"], r["seed"]) == (arithmetic(), model, seed) for r in done):
                done += of_seed(model, seed, epochs)
                if not options.quick:
                    RAW.write_text(json.dumps(done, indent=1) + "\n")
    named = list(dict.fromkeys(r["model"] for r in done))
    of = {(m, c): [r for r in done if (r["model"], r["candidate"]) == (m, c)] for m in named for c in CANDIDATES}
    rows = [summary(found) for found in of.values()]
    default = next(iter(DEFAULT))
    failures = []
    for model in named:
        worst = {r["candidate"]: r["worst"] for r in rows if r["model"] == model}
        if worst[default] < max(worst.values()) - 2:
            failures.append(f"{model}: {default} falls by {-worst[default]} points, the best by {-max(worst.values())}")
    return finish("prune_defaults", rows, failures, options)


DEFAULT = {"global, floor 0.1": CANDIDATES["global, floor 0.1"]}

if __name__ == "__main__":
    sys.exit(main())
