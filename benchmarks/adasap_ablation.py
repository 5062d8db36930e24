"""When does AdaSAP's adaptive radius earn its keep against one radius for all channels?

    python -m benchmarks.adasap_ablation [--quick] [--check] [--jobs N] [--seeds 0 1 2] [--macs 0.25 0.125]

The setting of robust_pruning, at cuts that hurt more. Steps 1 and 2, where the radius is adaptive, take 44 % of the
epochs as published, or 85 % of them ("long"), or remove everything at once ("one shot"). In each, AdaSAP with the
published and with narrower spreads of the radius, globally and per neuron, stands beside ASAM: the same code with the
same radius for every channel, and the same step 3. Prints the tables, writes benchmarks/results/adasap_ablation.json
and docs/results/adasap_ablation.md.

Targets (``--check`` exits 1 where one is missed): in every setting, AdaSAP above uniform ASAM on corrupted images by
more than a standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import _sweeps
from benchmarks._sweeps import Claim
from benchmarks.domain_generalization import MODEL, train
from benchmarks.robust_pruning import DATA, prune

NAME = "adasap_ablation"
RHO = 2.0  # of the least important channel, of every channel under ASAM, and of step 3
INTRO = f"""
Accuracy in percent, *sketch* held out. The least important channel has the radius {RHO:g} in every row; the most
important one has rho_min (ASAM: {RHO:g} too). Step 3 is the same for all. *as published*: the radius is adaptive for
44 % of the epochs; *long*: for 85 %; *one shot*: everything is removed at one event in place of eight.
"""
PHASES: dict[str, dict[str, Any]] = {
    "as published": {},
    "long": {"warmup_share": 0.35, "prune_share": 0.5},
    "one shot": {"schedule_steps": 1},
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ASAM": ("asam", {"rho": RHO}),
    "AdaSAP, rho_min 0.01": ("adasap", {"rho_min": 0.01, "rho_max": RHO}),
    "AdaSAP, rho_min 1": ("adasap", {"rho_min": 1.0, "rho_max": RHO}),
    "AdaSAP, rho_min 0.01, per neuron": ("adasap", {"rho_min": 0.01, "rho_max": RHO, "norm": "per_neuron"}),
}


def methods(shares: Sequence[float], epochs: tuple[int, int], phases: Sequence[str]) -> list[dict[str, Any]]:
    """A row per budget, phase and spread of the radius."""
    return [
        {
            "name": f"{share:.1%} {phase}: {label}",
            "stages": [train("none", epochs[0]), prune(method, share, epochs[1], **{**PHASES[phase], **keys})],
        }
        for share in shares
        for phase in phases
        for label, (method, keys) in METHODS.items()
    ]


def claims(shares: Sequence[float], phases: Sequence[str]) -> list[Claim]:
    """AdaSAP as published against ASAM, in every setting."""
    return [
        Claim(f"{s:.1%} {p}: AdaSAP, rho_min 0.01", f"{s:.1%} {p}: ASAM", "corrupted", standard_errors=1)
        for s in shares
        for p in phases
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; the exit code."""
    own = {"--macs": {"type": float, "nargs": "+", "default": [0.25, 0.125]}}
    options = _sweeps.arguments(__doc__, argv, own)
    shares, phases = ([0.25], ["one shot"]) if options.quick else (options.macs, list(PHASES))
    spec = {
        "recipe": {"device": "cpu", "threads": 1, "data": DATA, "model": MODEL, "stages": [train("none", 1)]},
        "methods": methods(shares, (4, 4) if options.quick else (12, 12), phases),
        "seeds": [0] if options.quick else [0, 1, 2],
        "held_out": ["sketch"],
    }
    finished = _sweeps.run(NAME, spec, options)
    sections = {
        f"{share:.1%} of the multiply-accumulates kept, {phase}": [
            f for f in finished if f.run.method.startswith(f"{share:.1%} {phase}:")
        ]
        for share in shares
        for phase in phases
    }
    title = "AdaSAP against one radius for all"
    return _sweeps.publish(NAME, title, INTRO, sections, claims(shares, phases), options)


if __name__ == "__main__":
    sys.exit(main())
