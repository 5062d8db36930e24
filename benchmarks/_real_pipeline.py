"""Whole pipelines of `benchmarks.real_domains` beside training with onnxruntime's quantization, from file to file."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._peer_runs import open_session, score
from benchmarks._real_rows import BATCH, QUICK_EPOCHS, Cell
from flatcompress import Pipeline
from flatcompress.data import DataBundle, ImageSet
from flatcompress.onnx_export.runtime import latency

CALIBRATED, TIMED = 512, 40


def run(cell: Cell, model: dict[str, Any], pictures: DataBundle, where: Path, quick: bool) -> dict[str, Any]:
    """Train the row's stages, write its file, and measure the file in onnxruntime.

    ``pictures`` has corrupted parts. ``milliseconds`` are a share of those of the float network's file, batch 1, one
    thread, medians of CPU time, both timed by turns. ``float_file``, of a peer: the same before quantization.
    """
    stages = [_shortened(stage) for stage in cell.row.whole] if quick else list(cell.row.whole)
    ours = cell.row.peer is None
    began = time.process_time()
    result = Pipeline(
        model, pictures, [*stages, *([{"export": {"profile": "packed", "latency": False}}] if ours else [])],
        seed=cell.seed, batch_size=BATCH, balance_domains=True, device="cpu", threads=1, measure="off",
        checkpoint_every="60s",
    ).run(where)  # fmt: skip
    plain = where / "float.onnx"
    _float_file(result.model if not ours else _network(model, pictures), pictures, plain)
    file = next(where.glob("**/model.onnx")) if ours else _static(plain, pictures, where / "static.onnx")
    seconds = time.process_time() - began
    kilobytes = round(plain.stat().st_size / 1000, 1)
    beside = {} if ours else {"float_file": {**_graded(plain, pictures), "kilobytes": kilobytes, "milliseconds": 1.0}}
    timed = latency.measure({"row": file, "float": plain}, threads=1, runs=TIMED, clock=time.process_time)
    return {
        **_graded(file, pictures),
        **beside,
        "val": None,
        "passes": sum(row["passes"] or 0 for row in result.ledger),
        "cpu_seconds": round(seconds, 1),
        "kilobytes": round(file.stat().st_size / 1000, 1),
        "milliseconds": round(timed["row"]["median_ms"] / timed["float"]["median_ms"], 3),
    }


def _shortened(stage: dict[str, Any]) -> dict[str, Any]:
    ((name, keys),) = stage.items()
    return {name: {**keys, "epochs": QUICK_EPOCHS}}


def _network(model: dict[str, Any], pictures: DataBundle) -> torch.nn.Module:
    from flatcompress import models

    return models.build(**model, num_classes=len(pictures.classes), input_shape=pictures.input_shape)


def _float_file(model: torch.nn.Module, pictures: DataBundle, path: Path) -> None:
    example = pictures.train.__getitems__([0])[0]
    torch.onnx.export(
        model.eval(), (example,), str(path), dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}}
    )


def _static(plain: Path, pictures: DataBundle, path: Path) -> Path:
    """onnxruntime's own quantization as its documentation advises: QDQ, per channel, calibrated on validation images.

    Weights of 8 and of 7 bits (`reduce_range`, advised for x86 processors without VNNI, whose kernels clip sums of
    8-bit products); the file that validation prefers stands for the peer.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    x, y = _arrays(pictures.val)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            calibrated = x[:CALIBRATED]
            self.batches = iter({"x": part} for part in np.split(calibrated, range(64, len(calibrated), 64)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    ready = path.with_name("ready.onnx")
    quant_pre_process(str(plain), str(ready))
    found: dict[Path, float] = {}
    for name, reduced in ((path, False), (path.with_name("reduced.onnx"), True)):
        quantize_static(
            str(ready), str(name), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=reduced,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        found[name] = score(open_session(name), x, y)
    return max(found, key=lambda name: found[name])


def _graded(file: Path, pictures: DataBundle) -> dict[str, Any]:
    session = open_session(file)
    parts = {name: getattr(pictures, name) for name in ("test", "held_out", "held_out_seen")}
    found = {name: score(session, *_arrays(part)) for name, part in parts.items()}
    sizes = {name: len(part) for name, part in parts.items()}
    both = sizes["held_out"] + sizes["held_out_seen"]
    pooled = sum(found[name] * sizes[name] for name in ("held_out", "held_out_seen")) / both
    corrupted = statistics.fmean(score(session, *_arrays(part)) for part in pictures.corrupted.values())
    return {"accuracy": found, "pooled": pooled, "corrupted": corrupted, "robust": (pooled + corrupted) / 2}


def _arrays(images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    x, y = images.__getitems__(list(range(len(images))))
    return x.numpy(), y.numpy()
