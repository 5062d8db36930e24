"""What is moved between layers before post-training quantization: SmoothQuant and FlatQuant on a vision transformer.

    python -m benchmarks.scalings [--quick] [--check]

vit_tiny is trained on rotated digits for 8 epochs, over seeds, and quantized without training, calibrated on 128
images (one draw a seed). ``agree``: share of test images, in percent, on which the class is the float network's.
``gain``: over nothing moved, paired by seed, with its standard error; ``seconds``: processor time of one quantization.
FlatQuant is the part of it that folds into weights.

Target (``--check`` exits 1 where it is missed): FlatQuant is not below nothing moved by more than two standard errors
at 4-bit activations, which it is made for.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks._common import arguments, finish
from benchmarks._ptq_networks import trained
from benchmarks.post_training import ours

NAME = "scalings"
BITS = ((4, 8), (4, 4), (3, 4))
ROWS = ("none", "smooth", "flatquant")


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; the exit code."""
    options = arguments(__doc__, argv)
    torch.set_num_threads(1)
    seeds, epochs = ((0,), 1) if options.quick else (tuple(range(5)), 8)
    rows: list[dict[str, Any]] = []
    for bits in BITS[1:2] if options.quick else BITS:
        found = {
            name: [ours(trained("vit_tiny", "none", s, epochs), bits, s, scaling=name) for s in seeds] for name in ROWS
        }
        for name, made in found.items():
            gains = [a["agree"] - b["agree"] for a, b in zip(made, found["none"])]
            rows.append({
                "bits": f"W{bits[0]}A{bits[1]}", "scaling": name, "seeds": len(seeds),
                **{key: round(statistics.fmean(m[key] for m in made), 2) for key in ("accuracy", "agree", "seconds")},
                "gain": round(statistics.fmean(gains), 2),
                "se": round(statistics.stdev(gains) / len(gains) ** 0.5, 2) if len(gains) > 1 else None,
            })  # fmt: skip
    missed = [
        f"{row['bits']}: flatquant agrees {-row['gain']:.2f} points less than nothing moved"
        for row in rows
        if row["scaling"] == "flatquant" and row["bits"].endswith("A4") and row["gain"] < -2 * (row["se"] or 0)
    ]
    return finish(NAME, rows, [] if options.quick else missed, options)


if __name__ == "__main__":
    sys.exit(main())
