"""The flat family side by side: float training, equal epochs, passes shown.

    python -m benchmarks.flat_family [--quick] [--check] [--jobs N] [--seeds 0 1 2] [--held-out sketch]

Styled shapes with *sketch* held out. Every method of the family trains the same network for the same epochs, with its
radius out of two values chosen by validation on the source styles (first seed); "plain, twice the epochs" spends SAM's
passes on the plain optimizer. Prints the table, writes benchmarks/results/flat_family.json and
docs/results/flat_family.md.

Targets (``--check`` exits 1 where one is missed): SAM above the plain optimizer on the held-out style and on corrupted
images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import _sweeps
from benchmarks._sweeps import Claim
from benchmarks.domain_generalization import MODEL, train
from benchmarks.robust_pruning import DATA
from flatcompress import flat

NAME = "flat_family"
INTRO = """
Accuracy in percent of the same network trained by every method for the same number of epochs; *passes* counts forward
and backward passes. A radius in brackets was chosen out of two by validation on the source styles.
"""
# Left out: a method that needs more than a loss on a batch (a posterior's own update, adapters of a language model,
# a reference network, several losses) says nothing under this protocol.
LEFT_OUT = ("bsam", "ggpo", "tram", "fmtl", "none")
QUICK = ("sam", "sagm")
RADII = {"asam": [0.5, 2.0], "fisher_sam": [0.1, 0.2]}
EPOCHS = 12


def methods(names: Sequence[str], epochs: int, quick: bool) -> list[dict[str, Any]]:
    """The rows: the plain optimizer at one and at two budgets, then the family."""
    rows: list[dict[str, Any]] = [
        {"name": "plain", "stages": [train("none", epochs)]},
        {"name": "plain, twice the epochs", "stages": [train("none", 2 * epochs)]},
    ]
    for name in names:
        row: dict[str, Any] = {"name": name, "stages": [train(name, epochs)]}
        if "rho" in flat.METHODS[name].defaults and not quick:
            row["grid"] = {"stages.0.train.rho": RADII.get(name, [0.05, 0.1])}
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; the exit code."""
    options = _sweeps.arguments(__doc__, argv)
    names = QUICK if options.quick else [name for name in flat.METHODS if name not in LEFT_OUT]
    spec = {
        "recipe": {"device": "cpu", "threads": 1, "data": DATA, "model": MODEL, "stages": [train("none", 1)]},
        "methods": methods(names, 4 if options.quick else EPOCHS, options.quick),
        "seeds": [0] if options.quick else [0, 1, 2],
        "held_out": ["sketch"],
        "tune_seeds": [0],
    }
    finished = _sweeps.run(NAME, spec, options)
    claims = [Claim("sam", "plain", metric, standard_errors=2) for metric in ("held_out", "corrupted")]
    return _sweeps.publish(NAME, "The flat family", INTRO, {"Float training": finished}, claims, options)


if __name__ == "__main__":
    sys.exit(main())
