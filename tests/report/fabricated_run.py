"""Writes a run folder as a four-stage run leaves it, with made-up but plausible numbers; seeded, needs no training."""

from __future__ import annotations

import base64
import io
import json
import math
import random
from pathlib import Path
from typing import Any

from PIL import Image

from flatcompress import report

RECIPE = """# Rotated digits, 75 degrees never seen in training.
name: {name}
seed: 0
output_dir: runs
data:   {{name: rotated-digits, held_out: "75", batch_size: 64}}
model:  {{name: resnet8}}
stages:
  - train:    {{method: sam, rho: 0.05, epochs: 20}}
  - prune:    {{method: adasap, ratio: 0.5, epochs: 8}}
  - quantize: {{method: gaqat, weight_bits: 4, activation_bits: 4, epochs: 12}}
  - export:   {{profile: packed}}
"""
LAYERS = ["conv1", *(f"stage{s}.0.conv{c}" for s in (1, 2, 3) for c in (1, 2)), "stage2.0.skip", "stage3.0.skip", "fc"]
KINDS = ["gaussian_noise", "shot_noise", "defocus_blur", "motion_blur", "contrast", "brightness", "pixelate"]
STAGES = ["0-train", "1-prune", "2-quantize", "3-export"]


def write_run(folder: Path, name: str = "quickstart", seed: int = 0) -> Path:
    """Fill ``folder`` and return it."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE.format(name=json.dumps(name)))
    (folder / "ledger.json").write_text(json.dumps({"schema": 1, "rows": rows(draw)}))
    log = [*events(draw), *({"event": "row", "row": row} for row in rows(random.Random(seed)))]
    (folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
    (folder / "certificate.json").write_text(json.dumps(certificate(draw)))
    (folder / "model.onnx").write_bytes(b"\0" * 23_412)
    for i, stage in enumerate(STAGES[:3]):
        (folder / "checkpoints" / stage).mkdir(parents=True)
        kinds = ["channels", "quantizers"][:i]
        steps = [{"kind": kind, "data": {}} for kind in kinds]
        (folder / "checkpoints" / stage / "plan.json").write_text(json.dumps({"schema": 1, "steps": steps}))
        (folder / "checkpoints" / stage / "model.safetensors").write_bytes(b"\0" * (320_000 >> i))
    Image.effect_noise((480, 96), 80).save(folder / "preview.png")
    (folder / "examples.json").write_text(json.dumps(examples(folder)))
    return folder


def rows(draw: random.Random) -> list[dict[str, Any]]:
    def row(
        stage, method, test, held, corrupted, sharpness, params, nonzero, macs, size, seconds, passes, latency=None
    ):
        corruptions = {f"{k}/{s}": round(corrupted + 0.09 - 0.045 * s + draw.uniform(-0.04, 0.04), 4)
                       for k in KINDS for s in (1, 2, 3, 4, 5)}  # fmt: skip
        return {"stage": stage, "method": method, "accuracy": {"test": test, "held_out": held, "corrupted": corrupted},
                "corruptions": corruptions, "sharpness": sharpness, "params": params, "nonzero": nonzero, "macs": macs,
                "bytes": size, "seconds": seconds, "passes": passes, "latency_ms": latency}  # fmt: skip

    return [
        row("train", "sam", 0.9861, 0.8423, 0.8190, 0.0214, 78_666, 78_662, 12_501_632, 314_664, 48.2, 9_600),
        row("prune", "adasap", 0.9833, 0.8391, 0.8244, 0.0187, 20_410, 20_409, 5_204_480, 81_640, 22.7, 3_840),
        row("quantize", "gaqat", 0.9792, 0.8460, 0.8121, 0.0231, 20_410, 18_744, 5_204_480, 12_630, 41.5, 5_760),
        row("export", "packed", 0.9792, 0.8458, 0.8120, None, 20_410, 18_744, 5_204_480, 23_412, 3.1, None, 0.1624),
    ]  # fmt: skip


def events(draw: random.Random) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def emit(event: str, stage: str | None = None, **fields: Any) -> None:
        minute = len(found)
        time = f"2026-03-01T12:{minute // 60 % 60:02d}:{minute % 60:02d}.000+00:00"
        found.append({"event": event, "time": time, "stage": stage, **fields})

    emit("run", name="quickstart", stages=STAGES, first=0, data="rotated-digits", held_out="75",
         classes=[f"digit {c}" for c in range(10)], environment={
        "python": "3.11.7", "system": "Linux", "machine": "x86_64", "device": "cpu", "threads": 2,
        "packages": {"flatcompress": "0.1.0", "torch": "2.9.0", "onnxruntime": "1.24.0"}})  # fmt: skip
    for stage, epochs, start in (("0-train", 20, 2.2), ("1-prune", 8, 0.5), ("2-quantize", 12, 0.6)):
        emit("stage", stage, index=int(stage[0]), of=4, method="sam", epochs=epochs, resumed_at_step=None)
        for i in range(1, epochs + 1):
            loss = start * math.exp(-4.2 * i / epochs) + 0.05 + draw.uniform(0, 0.02)
            emit("epoch", stage, epoch=i, epochs=epochs, loss=loss, accuracy=1 - 0.3 * loss, passes=480 * i,
                 val_accuracy=1 - 0.34 * loss - draw.uniform(0, 0.02), seconds=2.4, gap=loss * 0.3 + 0.02,
                 lr=3e-3 * 0.5 * (1 + math.cos(math.pi * i / epochs)))  # fmt: skip
            if stage == "1-prune":
                emit("prune", stage, step=i * 60, kept_channels=max(152, 304 - 38 * min(i, 4)), total_channels=304)
            if stage == "2-quantize":
                for k in range(4):
                    emit("conflict", stage, step=i * 60 + k * 15, quantizers=_quantizers(draw, i + k / 4, epochs))
        if stage == "2-quantize":
            emit("bits", stage, unit="effective_bits", budget=4.0, bits={n: 3 + i % 3 for i, n in enumerate(LAYERS)})
            emit("flatness", stage, rise=0.01, layers=_flatness(draw))
        emit("predictions", stage, of="", parts=predictions(STAGES.index(stage)))
        emit("layers", stage, layers=_layers(draw, STAGES.index(stage)))
        emit(
            "spent",
            stage,
            seconds={"the stage": 40.0, "accuracy": 3.0, "sharpness of each layer": 12.5},
            peak_bytes=900_000_000 + 10**8 * STAGES.index(stage),
        )
        if stage == "1-prune":
            emit("protected", stage, name="fc", reason="it makes the classes")
            emit("warning", stage, message="fc has no following layer; its channels are kept")
    emit("stage", "3-export", index=3, of=4, method="packed", epochs=None)
    emit("predictions", "3-export", of="", parts=predictions(2))
    kept = ("name", "kind", "weight_bits", "activation_bits", "bytes", "sparsity")
    emit("layers", "3-export", layers=[{k: row[k] for k in kept} for row in _layers(random.Random(1), 2)])
    emit("done", onnx="model.onnx")
    return found


def predictions(stage: int) -> dict[str, Any]:
    """What was said of a test part of 120 samples, a held-out one of 60 and a corrupted copy; worse with the stages."""
    return {
        part: _said(random.Random(n), n, stage) for part, n in (("test", 120), ("held_out", 60), ("contrast/5", 20))
    }


def _said(draw: random.Random, n: int, stage: int) -> dict[str, Any]:
    labels = [i % 10 for i in range(n)]
    predicted = [(label + 1) % 10 if draw.random() < 0.05 * (1 + stage) else label for label in labels]
    pairs = sorted(set(zip(labels, predicted)))
    counts = [[a, b, sum(1 for pair in zip(labels, predicted) if pair == (a, b))] for a, b in pairs]
    confidence = [draw.randint(400, 1000) for _ in labels]
    return {"samples": n, "counts": counts, "labels": labels, "predicted": predicted, "confidence": confidence}


def examples(folder: Path) -> dict[str, Any]:
    """The pictures that the page of ``folder`` asks for."""
    tile = io.BytesIO()
    Image.effect_noise((8, 8), 80).save(tile, format="PNG")
    image = "data:image/png;base64," + base64.b64encode(tile.getvalue()).decode()
    return report.examples.file_of([(w, image) for w in report.examples.wanted(report.gather(folder))])


def _quantizers(draw: random.Random, at: float, epochs: int) -> dict[str, Any]:
    result = {}
    for n, layer in enumerate(LAYERS):
        for kind in ("weight", "input"):
            disorder = min(1.0, max(0.0, 0.52 - 0.3 * at / epochs * (1 + 0.08 * n) + draw.gauss(0, 0.07)))
            result[f"{layer}.{kind}"] = {
                "disorder": disorder,
                "conflict": min(1.0, max(0.0, 0.45 + draw.gauss(0, 0.08))),
                "frozen": disorder < 0.3,
                "scale_ratio": math.exp((0.02 * n - 0.1) * at / 2 + draw.gauss(0, 0.01)),
            }
    return result


def _layers(draw: random.Random, done: int) -> list[dict[str, Any]]:
    found = []
    for n, name in enumerate(LAYERS):
        before = 10 if name == "fc" else 16 * 2 ** (n // 3)
        kept = before if name == "fc" or done < 1 else max(4, int(before * draw.uniform(0.35, 0.65)))
        ends = name in ("conv1", "fc")
        bits = (8 if ends else 4) if done == 2 else None
        weights = kept * 9 * before // 2
        found.append({"name": name, "kind": "linear" if name == "fc" else "conv", "channels": kept,
                      "channels_before": before, "weight_bits": bits, "activation_bits": bits,
                      "bytes": weights * (bits or 32) // 8, "sparsity": draw.uniform(0, 0.2) if done else 0.0,
                      "sharpness": draw.uniform(0.001, 0.02), "macs": weights * 64 // (1 + n // 3)})  # fmt: skip
    return found


def _flatness(draw: random.Random) -> list[dict[str, Any]]:
    found = []
    for n, name in enumerate(LAYERS):
        curvature, move = draw.uniform(0.01, 0.2) if n else -0.01, draw.uniform(0.2, 2.0)
        reach = math.sqrt(0.02 / curvature) if n else None
        found.append({"name": name, "bits": 3 + n % 3, "curvature": curvature, "reach": reach, "grid_move": move,
                      "strain": None if reach is None else (move / reach) ** 2})  # fmt: skip
    return found


def certificate(draw: random.Random) -> dict[str, Any]:
    def compared(same: float, steps: float) -> dict[str, Any]:
        return {"samples": 540, "largest_error_steps": steps, "mean_error_steps": 0.01, "equal_argmax": same}

    layers = [
        {"name": layer, "kind": "conv", "shape": [8, 4, 3, 3], "weight_bits": 4, "activation_bits": 4,
         "bytes": 1000 + 300 * n, "theoretical_bytes": 930.5 + 290 * n, "sparsity": draw.uniform(0, 0.2)}
        for n, layer in enumerate(LAYERS)
    ]  # fmt: skip
    return {
        "schema": 1,
        "holds": True,
        "failures": [],
        "file": {"name": "model.onnx", "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"},
        "recipe_sha256": "a" * 64,
        "versions": {"onnxruntime": "1.24.0", "torch": "2.9.0"},
        "size": {"bytes": 23_412, "theoretical_bytes": 9_872, "weight_bytes": 10_480, "graph_bytes": 12_932},
        "kernels": {"counts": {"QLinearConv": 9, "QGemm": 1}, "layers": 10, "integer_layers": 9, "not_integer": ["fc"]},
        "layers": layers,
        "parity": {"step": 0.084, "optimized": compared(1.0, 0.0), "unoptimized": compared(0.99815, 1.0)},
        "metric": {"name": "accuracy", "onnxruntime": 0.9792, "reference": 0.9792, "difference": 0.0},
        "integer": {
            "holds": False,
            "layers": 10,
            "integer_layers": 9,
            "share_of_weights": 0.98,
            "share_of_macs": 0.99,
            "share_of_time": 0.8,
            "floats": [{"name": "fc", "kernel": "Gemm", "share_of_weights": 0.02, "share_of_macs": 0.01}],
        },
        "float": {
            "bytes": 331_870,
            "smaller": 14.18,
            "faster": 2.13,
            "latency": {"median_ms": 0.3459},
            "pruned": {"bytes": 90_000, "latency": {"median_ms": 0.2101}},
        },
        "latency": {"method": "median of 30 runs, batch 1", "threads": {"1": {"median_ms": 0.1624, "p90_ms": 0.171}}},
    }
