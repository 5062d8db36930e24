"""Stage name -> the function that runs it."""

from __future__ import annotations

from flatcompress.stages import export, prune, quantize, train

RUN = {"train": train.run, "prune": prune.run, "quantize": quantize.run, "export": export.run}
