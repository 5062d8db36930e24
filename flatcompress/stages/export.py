"""The export stage: write the ONNX file, prove it, measure it as its users will."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from flatcompress import __version__, onnx_export
from flatcompress.plan import Plan, apply_plan
from flatcompress.stages.configs import ExportConfig
from flatcompress.stages.measure import accuracies, weights
from flatcompress.stages.workpiece import Workpiece


def run(work: Workpiece, config: ExportConfig) -> Workpiece:
    """Write model.onnx and certificate.json into the run folder and append the exported file's row to the ledger."""
    assert work.folder is not None
    first = "onnx" not in work.artifacts
    path = work.folder / ("model.onnx" if first else f"model-{config.profile}.onnx")
    write(work, config, path)
    if first:
        work.artifacts["onnx"] = path
    return work
