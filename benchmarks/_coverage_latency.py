"""SE and Hardswish networks in turn: our packed and float files, and onnxruntime's own static quantization of it."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from onnxruntime.quantization import QuantFormat, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks._common import calibration_reader
from benchmarks._coverage_networks import built
from flatcompress import quant
from flatcompress.onnx_export import export
from flatcompress.onnx_export.runtime import latency

NETWORKS = ["timm:mobilenetv3_small_100", "timm:efficientnet_lite0", "timm:ghostnet_100"]
RUNS = 30
SIZE = 224


def measured() -> list[dict[str, Any]]:
    """A row per network: median milliseconds of each file, one image, one thread, runs interleaved."""
    rows = []
    for name in NETWORKS:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            files = _files(name, Path(folder))
            found = latency.measure(files, threads=1, runs=RUNS)
        rows.append({"name": name, **{key: found[key]["median_ms"] for key in files}})
        print(rows[-1], flush=True)
    return rows


def _files(name: str, folder: Path) -> dict[str, Path]:
    model, _ = built(name)
    x = torch.randn(4, 3, SIZE, SIZE)
    files = {key: folder / f"{key}.onnx" for key in ("packed", "int8", "quantize_static", "float")}
    export(model.eval(), x[:1], files["float"], profile="float32")
    prepared = folder / "prepared.onnx"
    quant_pre_process(str(files["float"]), str(prepared), skip_symbolic_shape=True)
    reader = calibration_reader("input", x.split(1))
    quantize_static(prepared, files["quantize_static"], reader, quant_format=QuantFormat.QDQ, per_channel=True)
    quant.quantize(model, 8, 8, example_input=x[:1])
    quant.calibrate(model, [x])
    for profile in ("packed", "int8"):
        export(model.eval(), x[:1], files[profile], profile=profile)
    return files


def section(rows: list[dict[str, Any]]) -> list[str]:
    """The page's lines about latency; none without rows."""
    if not rows:
        return []
    lines = [
        "## Against onnxruntime's quantize_static",
        "",
        f"`python -m benchmarks.network_coverage --latency`: median milliseconds of {RUNS} runs for one image of "
        f"{SIZE} pixels on one thread, the four files of a network in turn in one process; W8A8 per channel in "
        "all three integer files. Compare within a line only. Measured on an AVX2 processor without VNNI: there the "
        "integer convolutions of small and depthwise layers take longer than the float ones by themselves, which is "
        "why two of the three are slower than their float file.",
        "",
        "| network | packed | int8 | quantize_static | float | packed / quantize_static | packed / float |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ms = [f"{row[key]:.2f}" for key in ("packed", "int8", "quantize_static", "float")]
        ratios = [f"{row['packed'] / row[key]:.2f}" for key in ("quantize_static", "float")]
        lines.append("| " + " | ".join([row["name"], *ms, *ratios]) + " |")
    return [*lines, ""]
