#!/usr/bin/env python3
"""Convert an exported .onnx file to onnxruntime's mobile format, .ort, and check that it gives the same outputs.

    python to_ort.py model.onnx [model.ort]

The optimizer runs now instead of on the device: integer kernels are fused and packed weights are unpacked, so the
.ort file holds int8 weights (and compresses well), loads faster, and runs in a minimal onnxruntime build. Layout
optimizations for this machine's processor are left out. Needs numpy and onnxruntime.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort


def convert(source: Path, target: Path) -> float:
    """Write ``target``; returns the largest difference between the two files' outputs on random inputs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", "ORT")
    before = ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    after = ort.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    fed = before.get_inputs()[0]
    shape = [4, *(d if isinstance(d, int) else 1 for d in fed.shape[1:])]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return float(np.abs(before.run(None, {fed.name: x})[0] - after.run(None, {fed.name: x})[0]).max())


def main() -> None:
    if len(sys.argv) not in (2, 3) or not Path(sys.argv[1]).is_file():
        sys.exit("usage: python to_ort.py model.onnx [model.ort]")
    source = Path(sys.argv[1])
    target = Path(sys.argv[2]) if len(sys.argv) == 3 else source.with_suffix(".ort")
    difference = convert(source, target)
    print(f"{target}: {target.stat().st_size} bytes (.onnx {source.stat().st_size}), largest difference {difference}")
    if target.stat().st_size > 1.2 * source.stat().st_size:
        print("it is larger because weights of less than 8 bits, and masks, are unpacked to a byte a weight in it.")
    if difference > 0:
        sys.exit("the two files do not agree bit for bit on this machine.")


if __name__ == "__main__":
    main()
