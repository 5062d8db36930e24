"""A training step through torch.compile against one as it is, float and with LSQ's quantizers.

    python -m benchmarks.compiled_step [--quick] [--check] [--threads 1]

ResNet-20 at 32 pixels and EfficientNet-Lite0 at 96 (without its published weights), batch 32, SGD with momentum, W4A4,
laid out as ``memory_format: auto`` chooses. All four contenders of a network alternate; ``gain`` is the median over
rounds of the time as it is over the compiled one in the same round, ``first`` the seconds of the first compiled step.
It needs a C++ compiler. --quick: ResNet-20 alone.

Target
  1. a quantized network is one graph: compiling with ``fullgraph`` succeeds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks._common import arguments, finish, interleaved, ratio
from benchmarks.memory_format import NETWORKS, network, step_of
from flatcompress.environment import keep_freed_memory
from flatcompress.training import compiling, layout

NAMES = ("resnet20", "efficientnet_lite0")


def row_of(name: str, rounds: int) -> list[dict[str, Any]]:
    """What was measured of one network: a row float, a row with LSQ."""
    auto = layout.chosen("auto", network(name), (3, NETWORKS[name], NETWORKS[name]), torch.device("cpu"))
    tasks: dict[str, Callable[[], Any]] = {}
    first = {}
    for kind in ("float", "lsq"):
        tasks[kind] = step_of(name, auto, kind == "lsq")
        tasks[f"{kind} compiled"] = step_of(name, auto, kind == "lsq", compiled=True)
        begun = time.monotonic()
        tasks[f"{kind} compiled"]()
        first[kind] = time.monotonic() - begun
    times = interleaved(tasks, rounds)
    return [
        {
            "network": name,
            "step": kind,
            "ms": 1e3 * statistics.median(times[kind]),
            "compiled_ms": 1e3 * statistics.median(times[f"{kind} compiled"]),
            "gain": ratio(times[kind], times[f"{kind} compiled"]),
            "first": first[kind],
        }
        for kind in first
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    options = arguments(__doc__, argv)
    compiling.check(torch.device("cpu"))
    keep_freed_memory()
    names = NAMES[:1] if options.quick else NAMES
    rows = [row for name in names for row in row_of(name, 3 if options.quick else 9)]
    return finish("compiled_step", rows, [], options)


if __name__ == "__main__":
    sys.exit(main())
