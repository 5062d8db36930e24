"""The whole pipeline, half of the multiply-accumulates and 4 bits in an ONNX file, against its parts.

    python -m benchmarks.pipeline_vs_parts [--quick] [--check] [--jobs N] [--seeds 0 1 2]

Styled shapes with *sketch* held out. Every compressed row ends in an exported file that onnxruntime measures: clean,
corrupted and held-out accuracy and true bytes. "plain" uses the plain optimizer, magnitude and LSQ all the way; "flat"
uses SAGM, AdaSAP and GAQAT. Prints the table, writes benchmarks/results/pipeline_vs_parts.json and
docs/results/pipeline_vs_parts.md.

Targets (``--check`` exits 1 where one is missed): the flat pipeline above the plain one on corrupted images and on the
held-out style; and above the plain *float* network on corrupted images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import _sweeps
from benchmarks._sweeps import Claim
from benchmarks.domain_generalization import MODEL, QAT_RHO, RHO, K, quantize, train
from benchmarks.robust_pruning import DATA, prune

NAME = "pipeline_vs_parts"
INTRO = """
Accuracy in percent. *plain*: plain optimizer, magnitude pruning, LSQ. *flat*: SAGM, AdaSAP, GAQAT. Pruned rows keep
50 % of the multiply-accumulates, quantized ones have 4-bit weights and activations. Every row was measured through
onnxruntime on the exported file, and *kB* is that file.
"""


def methods(epochs: tuple[int, int, int]) -> list[dict[str, Any]]:
    """The rows: float, pruned, quantized and both, plain and flat."""
    first, second, third = epochs
    starts = {"plain": train("none", first), "flat": train("sagm", first, rho=RHO)}
    cuts = {"plain": prune("magnitude", 0.5, second), "flat": prune("adasap", 0.5, second)}
    grids = {"plain": quantize("lsq", 4, third), "flat": quantize("gaqat", 4, third, K=K, rho=QAT_RHO)}
    packed, floats = {"export": {"profile": "packed"}}, {"export": {"profile": "float32"}}
    rows = []
    for kind in ("plain", "flat"):
        start, cut, grid = starts[kind], cuts[kind], grids[kind]
        rows += [
            {"name": f"{kind}: float", "stages": [start, floats]},
            {"name": f"{kind}: pruned", "stages": [start, cut, floats]},
            {"name": f"{kind}: W4A4", "stages": [start, grid, packed]},
            {"name": f"{kind}: pruned, W4A4", "stages": [start, cut, grid, packed]},
        ]
    return rows


CLAIMS = [
    Claim("flat: pruned, W4A4", "plain: pruned, W4A4", "corrupted"),
    Claim("flat: pruned, W4A4", "plain: pruned, W4A4", "held_out"),
    Claim("flat: pruned, W4A4", "plain: float", "corrupted"),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; the exit code."""
    options = _sweeps.arguments(__doc__, argv)
    spec = {
        "recipe": {"device": "cpu", "threads": 1, "data": DATA, "model": MODEL, "stages": [train("none", 1)]},
        "methods": methods((3, 3, 2) if options.quick else (12, 12, 6)),
        "seeds": [0] if options.quick else [0, 1, 2],
        "held_out": ["sketch"],
    }
    finished = _sweeps.run(NAME, spec, options)
    return _sweeps.publish(NAME, "The pipeline against its parts", INTRO, {"All": finished}, CLAIMS, options)


if __name__ == "__main__":
    sys.exit(main())
