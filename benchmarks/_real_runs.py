"""One run of `benchmarks.real_domains`: trained by the pipeline, then what is told of it as plain numbers."""

from __future__ import annotations

import json
import statistics
import time
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import _real_pipeline
from benchmarks._real_rows import BATCH, EPOCHS, FLOATS, SIZE, Cell
from flatcompress import Pipeline, data, flat, quant
from flatcompress.data import DataBundle
from flatcompress.tasks import build
from flatcompress.training.batches import evaluate

SPLIT = {"group": "name", "val_fraction": 0.15, "test_fraction": 0.25}
SHARPNESS_SAMPLES, SHARPNESS_RHO = 128, 0.05
# Lite0 was trained on inputs of this mean and spread, see its package.
NORMALISED = {"mean": [127 / 255] * 3, "std": [128 / 255] * 3}


@lru_cache(maxsize=2)
def bundle(folder: str, held_out: str, seed: int, corruptions: str = "none") -> DataBundle:
    """The pictures, split by identity; another seed splits, and starts, anew."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return data.load(
            "domains", seed=seed, path=folder, held_out=held_out, size=SIZE, augment="domainbed",
            corruptions=corruptions, corrupted_count=300,
            **SPLIT, **NORMALISED,
        )  # fmt: skip


def run(cell: Cell, folder: str, output: Path, epochs: int = EPOCHS) -> dict[str, Any]:
    """Train ``cell`` and measure it. Its float start must have been run (`start_of`)."""
    model: dict[str, Any] = {**_network(cell)}
    if cell.row.whole:
        pictures = bundle(folder, cell.held_out, cell.seed, "default")
        return _real_pipeline.run(cell, model, pictures, run_folder(cell, output), epochs < EPOCHS)
    pictures = bundle(folder, cell.held_out, cell.seed)
    if not cell.row.is_start:
        model["weights"] = str(run_folder(start_of(cell), output) / "checkpoints" / "0-train" / "model.safetensors")
    pipeline = Pipeline(
        model, pictures, [cell.row.stage(cell.network, epochs)], seed=cell.seed, batch_size=BATCH, balance_domains=True,
        device="cpu", threads=1, measure="off", checkpoint_every="60s",
    )  # fmt: skip
    began, where = time.process_time(), run_folder(cell, output)
    whole = not (where / "log.jsonl").exists()
    result = pipeline.run(where)
    row, events = result.ledger[-1], [json.loads(line) for line in (where / "log.jsonl").read_text().splitlines()]
    return {
        "accuracy": row["accuracy"],
        "pooled": _pooled(row["accuracy"], pictures),
        "val": _selected(events),
        "passes": row["passes"],
        "cpu_seconds": round(time.process_time() - began, 1) if whole else None,  # of a run that nobody stopped
        "sharpness": _sharpness(result.model, pictures),
        **(_corrupted(result.model, cell, folder) if cell.row.macs is not None else {}),
        **_scales(result.model, events),
    }


def _pooled(accuracy: dict[str, float | None], pictures: DataBundle) -> float | None:
    """Over every emoji of the held-out style."""
    parts = [(accuracy[name], getattr(pictures, name)) for name in ("held_out", "held_out_seen")]
    known = [(value, len(part)) for value, part in parts if value is not None and part is not None]
    return sum(v * n for v, n in known) / sum(n for _, n in known) if known else None


def start_of(cell: Cell) -> Cell:
    """The float run that ``cell`` begins with."""
    row = next(row for row in FLOATS if row.name == cell.row.start)
    return Cell(cell.network, cell.held_out, cell.seed, row)


def run_folder(cell: Cell, output: Path) -> Path:
    """Where the run lies."""
    plain = "".join(c if c.isalnum() or c in "-/" else "_" for c in cell.key.replace(" / ", "/").replace(" ", "-"))
    return output / plain


def _network(cell: Cell) -> dict[str, Any]:
    from benchmarks._real_rows import NETWORKS

    return NETWORKS[cell.network]


def _selected(events: list[dict[str, Any]]) -> float | None:
    """Validation accuracy of the epoch (or average) that was kept, as it ships."""
    found = [e for e in events if e["event"] == "selected"]
    return found[-1].get("val_accuracy") if found else None


def _sharpness(model: torch.nn.Module, pictures: DataBundle) -> float:
    """L(w + e) - L(w) at ||e|| = 0.05 along the gradient, on training pictures."""
    x, y = pictures.train.__getitems__(list(range(SHARPNESS_SAMPLES)))
    loss = torch.nn.functional.cross_entropy
    return float(flat.sharpness.sharpness(model, [(x, y)], loss, rho=SHARPNESS_RHO))


def _corrupted(model: torch.nn.Module, cell: Cell, folder: str) -> dict[str, Any]:
    """Mean accuracy over the usual corruptions of test pictures."""
    changed = bundle(folder, cell.held_out, cell.seed, "default").corrupted
    scores = [evaluate(model, part, build())["accuracy"] for part in changed.values()]
    return {"corrupted": statistics.fmean(scores)}


def _scales(model: torch.nn.Module, events: list[dict[str, Any]]) -> dict[str, Any]:
    """How far scales have travelled (median of |log s / s0|), and what GAQAT's watch saw in its last window."""
    if not quant.is_quantized(model):
        return {}
    kinds: dict[str, list[float]] = {"weights": [], "activations": []}
    for quantizer in quant.tensor_quantizers(model).values():
        travel = (quantizer.scale.detach() / quantizer.initial).clamp_min(1e-9).log().abs()
        kinds["activations" if quantizer.per_sample else "weights"] += travel.flatten().tolist()
    told: dict[str, Any] = {"travel": {k: statistics.median(v) for k, v in kinds.items() if v}}
    windows = [e["quantizers"] for e in events if e["event"] == "conflict"]
    if windows:
        told["watch"] = {
            key: statistics.fmean(v for w in windows for q in w.values() if (v := q[key]) is not None)
            for key in ("disorder", "conflict", "frozen")
        }
    return told
