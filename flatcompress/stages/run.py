"""Stage name -> the function that runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flatcompress.stages import export, prune, quantize, sparsify, train
from flatcompress.stages.workpiece import Workpiece

RUN: dict[str, Callable[[Workpiece, Any], Workpiece]] = {
    "train": train.run,
    "prune": prune.run,
    "sparsify": sparsify.run,
    "quantize": quantize.run,
    "export": export.run,
}
