"""The device kit on a 64-bit ARM processor, emulated by qemu-user: what it runs there, and with which bits.

ARM64_ROOT names a folder that ``tests/export/arm64_root.sh`` made: Python, numpy and onnxruntime for that processor.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from flatcompress import models, quant
from flatcompress.onnx_export import certify, export

KIT = Path(__file__).parents[2] / "export"
SHAPE = (1, 12, 12)


@pytest.fixture(scope="module")
def python() -> list[str]:
    """The command of a Python that runs on the emulated processor."""
    root = os.environ.get("ARM64_ROOT")
    if shutil.which("qemu-aarch64") is None or root is None:
        pytest.skip("needs qemu-aarch64 (Debian: qemu-user) and ARM64_ROOT, a folder that arm64_root.sh made")
    return ["qemu-aarch64", "-L", root, "-E", f"PYTHONPATH={root}/site", f"{root}/usr/bin/python3"]


@pytest.mark.slow
@pytest.mark.parametrize(("profile", "weight", "activation"), [("packed", 4, 4), ("packed", 3, 8), ("int8", 8, 8)])
def test_the_runner_gives_every_bit_of_the_reference_on_arm64(python, profile, weight, activation, tmp_path):
    model = models.build("resnet8", num_classes=10, input_shape=SHAPE, seed=0, width=8)
    x = torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(0))
    quant.quantize(model, weight_bits=weight, activation_bits=activation, example_input=x[:2])
    quant.calibrate(model, [x])
    made = {"preprocessing": json.dumps({"layout": "NCHW", "size": SHAPE, "mean": [0.0], "std": [1.0]})}
    exported = export(model.eval(), x[:2], tmp_path / "model.onnx", profile, metadata=made)
    with torch.no_grad():
        labels = model(x).argmax(1)
    certificate = certify(exported, [x], labels, latency_runs=0, evaluations=8)
    command = [*python, str(KIT / "runner.py"), str(tmp_path / "model.onnx"), "check"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout)
    assert found["samples"] == 40 and found["largest_error"] == 0.0 and found["equal_argmax"] == 1.0
    assert found["accuracy"] == certificate["metric"]["onnxruntime"]
