"""Does flatness while pruning keep accuracy on corrupted images and on an unseen style?

    python -m benchmarks.robust_pruning [--quick] [--check] [--jobs N] [--seeds 0 1 2] [--macs 0.5 0.25]

Styled shapes with *sketch* held out. One dense network, trained by the plain optimizer, is pruned by every method to
the same budget of multiply-accumulates, at equal epochs. Corrupted accuracy is the mean over kinds and severities on
in-domain test images. Every method's radius or strength is chosen by validation on the source styles. Prints the
tables, writes benchmarks/results/robust_pruning.json and docs/results/robust_pruning.md.

Targets (``--check`` exits 1 where one is missed): at 50 % of the MACs AdaSAP (global norm) at least 5 points above
magnitude with the plain optimizer on corrupted images; at 25 % above it by more than two standard errors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import _sweeps
from benchmarks._sweeps import Claim
from benchmarks.domain_generalization import MODEL, train

NAME = "robust_pruning"
DATA = {"name": "styled-shapes", "size": 24, "train_count": 600, "corrupted_count": 300, "batch_size": 64}
INTRO = """
Accuracy in percent. *corrupted* is the mean over corruption kinds and severities of in-domain test images; *sketch* is
the style that no training image had. All pruned rows start from the same dense ERM network and take the same number of
epochs; flat methods take two passes a step, "twice the epochs" gives the plain optimizer as many. `R_C` is corrupted
over clean accuracy, *sharpness* the rise of the training loss at distance 0.05.
"""


def prune(method: str, macs: float, epochs: int, **keys: Any) -> dict[str, Any]:
    """A prune stage: steps 1 and 2 in 44 % of the epochs, the rest trains on."""
    return {
        "prune": {
            "method": method, "macs": macs, "epochs": epochs, "optimizer": {"name": "adamw", "lr": 1.5e-3},
            "warmup_share": 0.19, "prune_share": 0.25, "round_to": 1, **keys,
        }
    }  # fmt: skip


def methods(shares: Sequence[float], epochs: tuple[int, int], quick: bool) -> list[dict[str, Any]]:
    """The rows: the dense network, then every method at every budget."""
    dense = train("none", epochs[0])
    rows: list[dict[str, Any]] = [{"name": "dense ERM", "stages": [dense]}]
    for share in shares:

        def row(
            label: str, method: str, share: float = share, grid: Any = None, times: int = 1, **keys: Any
        ) -> dict[str, Any]:
            stages = [dense, prune(method, share, times * epochs[1], **keys)]
            tried = {f"stages.1.prune.{k}": v for k, v in (grid or {}).items()}
            return {"name": f"{share:.0%} {label}", "stages": stages, "grid": {} if quick else tried}

        rows += [
            row("magnitude", "magnitude"),
            row("AdaSAP", "adasap", grid={"rho_max": [1.0, 2.0, 4.0]}),
        ]
        if not quick:
            rows += [
                row("magnitude, twice the epochs", "magnitude", times=2),
                row("ASAM", "asam", grid={"rho": [0.5, 2.0, 4.0]}),
                row("SAM", "sam", grid={"rho": [0.1, 0.2, 0.4]}),
                row("Taylor", "taylor"),
                row("AdaSAP, per neuron", "adasap", norm="per_neuron", grid={"rho_max": [0.5, 1.0, 2.0]}),
                row("group norm", "group_norm", grid={"strength": [0.01, 0.1, 1.0]}),
                row("MaskSparsity", "masksparsity", grid={"strength": [5e-4, 0.05]}),
                row("growing regularisation", "growing_reg", grid={"strength": [0.01, 1.0]}),
            ]
    return rows


def claims(shares: Sequence[float]) -> list[Claim]:
    """The targets of the module's docstring, and what else the page answers."""
    found = []
    for share in shares:
        name = f"{share:.0%}"
        least = 0.05 if share == 0.5 else 0.0
        found += [
            Claim(f"{name} AdaSAP", f"{name} magnitude", "corrupted", least, 0 if least else 2),
            Claim(f"{name} AdaSAP", f"{name} magnitude", "held_out", standard_errors=1),
            Claim(f"{name} AdaSAP", f"{name} magnitude, twice the epochs", "corrupted", standard_errors=1),
            Claim(f"{name} AdaSAP", f"{name} ASAM", "corrupted", standard_errors=1),
        ]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; the exit code."""
    own = {"--macs": {"type": float, "nargs": "+", "default": [0.5, 0.25]}}
    options = _sweeps.arguments(__doc__, argv, own)
    shares = [0.5] if options.quick else options.macs
    spec = {
        "recipe": {"device": "cpu", "threads": 1, "data": DATA, "model": MODEL, "stages": [train("none", 1)]},
        "methods": methods(shares, (4, 4) if options.quick else (12, 12), options.quick),
        "seeds": [0] if options.quick else [0, 1, 2],
        "held_out": ["sketch"],
        "tune_seeds": [0, 1, 2],
    }
    finished = _sweeps.run(NAME, spec, options)
    dense = [f for f in finished if f.run.method.startswith("dense")]
    sections = {}
    for share in shares:
        part = [f for f in finished if f.run.method.startswith(f"{share:.0%} ")]
        sections[f"{share:.0%} of the multiply-accumulates kept"] = [*dense, *part]
    return _sweeps.publish(NAME, "Robust pruning", INTRO, sections, claims(shares), options)


if __name__ == "__main__":
    sys.exit(main())
