"""Stage name -> the function that runs it."""

from __future__ import annotations

from flatcompress.stages import export, prune, quantize, sparsify, train

RUN = {
    "train": train.run,
    "prune": prune.run,
    "sparsify": sparsify.run,
    "quantize": quantize.run,
    "export": export.run,
}
