"""Five widths from one elastic run against five runs of their own, on styled shapes whose held-out style is never seen.

    python -m benchmarks.elastic_widths [--quick] [--check]

A resnet8 is trained on styled shapes. *elastic*: one run of nested widths 0.2, 0.4, 0.6, 0.8 and 1.0, one width drawn
a step with a probability of 1 / sqrt(width), by the base optimizer alone. *separate*: for each width a run that trains
the full network and prunes it to that share of the channels in every layer while training on (the full width trains for
as long), by SAM. The elastic run takes a third of the passes of the five together; SAM, which takes two a step, would
have half the steps, which the widths share, and was worse at every width (seed 0, both drawn by 1 / width). Both at a
learning rate of 0.008, at which both are better than at the default. Accuracies are of the float networks on the test
part, in percent. Cells that are done are kept in benchmarks/results/elastic_widths.partial, so a run that was stopped
goes on; ``--kept`` shows the seeds that are measured in full.

Target (``--check`` exits 1 where it is missed): on the mean over the seeds every width is within 1.0 point of its own
run.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import _common
from flatcompress import Pipeline
from flatcompress.data import load
from flatcompress.training.batches import evaluate

NAME = "elastic_widths"
WIDTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
POINTS = 1.0
OPTIMIZER = {"name": "adamw", "lr": 8e-3}
TRAIN, PRUNE = 4, 8  # epochs of a separate run; a full width trains for both


def pipeline(stages: Sequence[dict[str, Any]], seed: int, data: Any) -> Pipeline:
    """A run that measures nothing but accuracy."""
    return Pipeline(
        model={"name": "resnet8"}, data=data, stages=list(stages), seed=seed, device="cpu", threads=1, measure="off",
        batch_size=64,
    )  # fmt: skip


def separate(width: float, seed: int, data: Any, scale: float) -> dict[str, float]:
    """Accuracy in percent and passes of a run for one width."""
    train, prune = round(scale * TRAIN), round(scale * PRUNE)
    if width == 1.0:
        stages = [{"train": {"method": "sam", "epochs": train + prune, "optimizer": OPTIMIZER}}]
    else:
        cut = {"method": "sam", "ratio": 1 - width, "ranking": "uniform", "round_to": 1, "epochs": prune, "floor": 0.0,
               "optimizer": OPTIMIZER}  # fmt: skip
        stages = [{"train": {"method": "sam", "epochs": train, "optimizer": OPTIMIZER}}, {"prune": cut}]
    with tempfile.TemporaryDirectory() as folder:
        ledger = pipeline(stages, seed, data).run(folder).ledger
    return {
        "accuracy": 100 * ledger[-1]["accuracy"]["test"],
        "passes": sum(row["passes"] for row in ledger),
        "params": ledger[-1]["params"],
    }


def elastic(seed: int, data: Any, scale: float) -> dict[str, Any]:
    """Accuracies in percent by width and passes of one elastic run, a third of the five runs' epochs."""
    epochs = round(scale * 2 * (TRAIN + PRUNE) * len(WIDTHS) / 3)
    keys = {"method": "none", "epochs": epochs, "sampling": "narrow", "narrow_power": 0.5, "optimizer": OPTIMIZER}
    stages = [{"elastic": {"widths": list(WIDTHS), **keys}}]
    with tempfile.TemporaryDirectory() as folder:
        result = pipeline(stages, seed, data).run(Path(folder) / "run")
    found = {}
    for index, width in enumerate(WIDTHS):
        network = result.model.network(index) if index < len(WIDTHS) - 1 else result.model.full
        found[f"{width:g}"] = 100 * evaluate(network, data.test, data.task, "cpu")["accuracy"]
    return {"accuracy": found, "passes": result.ledger[-1]["passes"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not there yet, print, write; the exit code."""
    options = _common.arguments(__doc__, argv, _common.resumable)
    seeds, scale = ((0,), 0.5) if options.quick else ((0, 1, 2), 1.0)
    store = _common.kept(NAME, options)
    rows, passes = [], {"elastic": 0.0, "separate": 0.0}
    found: dict[float, list[tuple[float, float]]] = {width: [] for width in WIDTHS}
    for seed in seeds:
        data = None if options.kept else load("styled-shapes", seed=seed, corruptions="none")
        one = store.get(f"elastic/{seed}", partial(elastic, seed, data, scale))
        alone = {w: store.get(f"{w:g}/{seed}", partial(separate, w, seed, data, scale)) for w in WIDTHS}
        if one is None or None in alone.values():
            print(f"seed {seed}: not measured in full, and left out", file=sys.stderr)
            continue
        passes["elastic"] += one["passes"]
        for width, own in alone.items():
            passes["separate"] += own["passes"]
            found[width].append((one["accuracy"][f"{width:g}"], own["accuracy"]))
    if not found[WIDTHS[0]]:
        raise SystemExit("no seed is measured in full: run without --kept.")
    for width, pairs in found.items():
        gains = [a - b for a, b in pairs]
        rows.append({
            "width": width, "elastic": statistics.fmean(a for a, _ in pairs),
            "separate": statistics.fmean(b for _, b in pairs), "difference": round(statistics.fmean(gains), 2),
            "seeds": len(gains),
            "standard error": round(statistics.stdev(gains) / len(gains) ** 0.5, 2) if len(gains) > 1 else None,
        })  # fmt: skip
    rows.append({"width": "passes", "elastic": passes["elastic"], "separate": passes["separate"]})
    missed = [
        f"width {row['width']:g} is {-row['difference']:.2f} points below its own run"
        for row in rows[:-1]
        if row["difference"] < -POINTS
    ]
    return _common.finish(NAME, rows, missed, options)


if __name__ == "__main__":
    sys.exit(main())
