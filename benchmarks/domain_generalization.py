"""Do flat minima help on a style that was never seen, before and after low-bit training?

    python -m benchmarks.domain_generalization [--quick] [--check] [--jobs N] [--seeds 0 1 2] [--bits 4 3 2]

Styled shapes: 12 classes in 4 styles, 600 images each, every style held out in turn. A small residual network is
trained float, by the plain optimizer and by SAGM, and from there quantized by every method at W4A4, W3A3 and W2A2.
Epochs are chosen by validation on the source styles, and so is the radius of every flat QAT method (two styles held
out in turn). Prints the tables, writes benchmarks/results/domain_generalization.json and
docs/results/domain_generalization.md. `--collect` makes them from the runs that are finished.

Targets (``--check`` exits 1 where one is missed), on the held-out style, paired by seed and style: float SAGM above
float ERM by more than two standard errors, also when ERM gets as many passes, and so float SAM; at every bit width
LSQ under SAGM above plain LSQ (from ERM) by more than two standard errors, and GAQAT and the best variant of
`gaqat_variants` above naive LSQ+SAGM by more than one; at 4 and 3 effective bits LSQ with bits: auto not below LSQ
with 4 and 3 bits everywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import _sweeps
from benchmarks._sweeps import Claim

NAME = "domain_generalization"
STYLES = ["photo", "art", "cartoon", "sketch"]
DATA = {"name": "styled-shapes", "size": 24, "train_count": 600, "corruptions": "none", "batch_size": 64}
MODEL = {"name": "resnet8", "stem_stride": 2}
K = 20  # steps a window: a run has 168
RHO = 0.4  # of float flat training: the best of 0.1, 0.2 and 0.4 by validation on the source styles, seed 0
QAT_RHO = 0.2  # of flat low-bit training, where it is not tuned
QAT_RHOS = [0.1, 0.2, 0.4]
AUTO = (4, 3)  # effective bits at which bits: auto has rows
INTRO = """
Accuracy in percent on 12 drawn classes; three styles are trained on, the fourth (the column) is only tested on. All
methods of a block see the same number of epochs; a flat method takes two passes a step, which the column *passes*
shows. QAT starts from the float network that its name says (SAGM unless it says ERM). *bits: auto* gives layers
different bits only where the loss, measured, rises clearly less for it; where that is nowhere, its runs are those of
uniform bits.
"""


def train(method: str, epochs: int, **keys: Any) -> dict[str, Any]:
    """A float stage."""
    return {"train": {"method": method, "epochs": epochs, "optimizer": {"name": "adamw", "lr": 3e-3}, **keys}}


def quantize(method: str, width: int, epochs: int, **keys: Any) -> dict[str, Any]:
    """A QAT stage at W = A = ``width`` bits."""
    return {
        "quantize": {
            "method": method, "weight_bits": width, "activation_bits": width, "epochs": epochs,
            "optimizer": {"name": "adamw", "lr": 1e-3}, **keys,
        }
    }  # fmt: skip


def methods(bits: Sequence[int], epochs: tuple[int, int], quick: bool) -> list[dict[str, Any]]:
    """The rows: the float networks, then every QAT method at every bit width."""
    erm, sagm = train("none", epochs[0]), train("sagm", epochs[0], rho=RHO)
    rows: list[dict[str, Any]] = [
        {"name": "float ERM", "stages": [erm]},
        {"name": "float SAGM", "stages": [sagm]},
    ]
    if not quick:
        rows.append({"name": "float ERM, twice the epochs", "stages": [train("none", 2 * epochs[0])]})
        tried = {"stages.0.train.rho": [0.05, 0.1, 0.2]}
        rows.append({"name": "float SAM", "stages": [train("sam", epochs[0], rho=0.1)], "grid": tried})
    for b in bits:
        rows += _quantized(b, epochs[1], erm, sagm, quick)
    return rows


def _quantized(b: int, epochs: int, erm: Any, sagm: Any, quick: bool) -> list[dict[str, Any]]:
    def row(label: str, method: str, start: Any = sagm, flat: bool = False, **keys: Any) -> dict[str, Any]:
        tried = {"stages.1.quantize.rho": QAT_RHOS} if flat and not quick else {}
        keys = {"rho": QAT_RHO, **keys} if flat else keys
        return {"name": f"W{b}A{b} {label}", "stages": [start, quantize(method, b, epochs, **keys)], "grid": tried}

    rows = [
        row("LSQ from ERM", "lsq", erm),
        row("LSQ+SAGM", "lsq_sagm", flat=True),
        row("GAQAT", "gaqat", flat=True, K=K),
    ]
    if quick:
        return rows
    rows[1:1] = [row("LSQ", "lsq"), row("LSQ+SAM", "lsq_sam", flat=True)]
    rows += [
        row("GAQAT as published", "gaqat", flat=True, K=K, tau=0.3, tau_kind="absolute"),
        row("LSQ+SAGM, distilled", "lsq_sagm", flat=True, distill=1.0),  # the best variant of gaqat_variants
        row("SAQ", "saq", flat=True),
        {"name": f"W{b}A32 QT-DoG", "stages": [erm, quantize("qt_dog", b, epochs, activation_bits=None)]},
    ]
    auto: dict[str, Any] = {"bits": "auto", "effective_bits": float(b)}
    if b in AUTO:
        rows += [
            row("LSQ, bits: auto", "lsq", **auto),
            row("LSQ, bits: auto by gradient", "lsq", sensitivity="gradient", **auto),
        ]
    if b == 4:
        rows += [
            row("LSQ, bits: auto by Hessian", "lsq", sensitivity="hessian", **auto),
            row("LSQ+SAGM, bits: auto by Hessian", "lsq_sagm", flat=True, sensitivity="hessian", **auto),
        ]
    return rows


def claims(bits: Sequence[int]) -> list[Claim]:
    """The targets of the module's docstring."""
    found = [
        Claim("float SAGM", "float ERM", standard_errors=2),
        Claim("float SAGM", "float ERM, twice the epochs", standard_errors=2),
        Claim("float SAM", "float ERM", standard_errors=2),
    ]
    for b in bits:
        found += [
            Claim(f"W{b}A{b} LSQ+SAGM", f"W{b}A{b} LSQ from ERM", standard_errors=2),
            Claim(f"W{b}A{b} GAQAT", f"W{b}A{b} LSQ+SAGM", standard_errors=1),
            Claim(f"W{b}A{b} LSQ+SAGM, distilled", f"W{b}A{b} LSQ+SAGM", standard_errors=1),
        ]
    for b in [b for b in bits if b in AUTO]:
        found += [
            Claim(f"W{b}A{b} LSQ, bits: auto", f"W{b}A{b} LSQ", or_equal=True),
            Claim(f"W{b}A{b} LSQ, bits: auto by gradient", f"W{b}A{b} LSQ", or_equal=True),
        ]
    if 4 in bits:
        found += [
            Claim("W4A4 LSQ, bits: auto by Hessian", "W4A4 LSQ", or_equal=True),
            Claim("W4A4 LSQ+SAGM, bits: auto by Hessian", "W4A4 LSQ+SAGM", or_equal=True),
        ]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; the exit code."""
    own = {"--bits": {"type": int, "nargs": "+", "default": [4, 3, 2], "choices": range(2, 9)}}
    options = _sweeps.arguments(__doc__, argv, own)
    bits = [3] if options.quick else options.bits
    spec = {
        "recipe": {"device": "cpu", "threads": 1, "data": DATA, "model": MODEL, "stages": [train("none", 1)]},
        "methods": methods(bits, (4, 2) if options.quick else (12, 6), options.quick),
        "seeds": [0] if options.quick else [0, 1, 2],
        "held_out": ["sketch"] if options.quick else STYLES,
        "tune_held_out": ["sketch"] if options.quick else ["photo", "sketch"],
    }
    finished = _sweeps.run(NAME, spec, options)
    sections = {"Float": [f for f in finished if f.run.method.startswith("float")]}
    for b in bits:
        sections[f"{b} bits"] = [f for f in finished if f.run.method.startswith(f"W{b}A")]
    return _sweeps.publish(NAME, "Domain generalization", INTRO, sections, claims(bits), options)


if __name__ == "__main__":
    sys.exit(main())
