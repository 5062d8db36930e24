"""A search of seconds: few digits, the smallest network, one epoch."""

from __future__ import annotations

from typing import Any

from flatcompress.search.spec import Search, parse_search

RECIPE: dict[str, Any] = {
    "device": "cpu",
    "checkpoint_every": 1,
    "data": {"name": "rotated-digits", "domains": ["0"], "held_out": "75", "size": 8, "test_fraction": 0.8,
             "corruptions": "none", "batch_size": 128},
    "model": {"name": "resnet8", "width": 4},
    "stages": [
        {"train": {"method": "none", "epochs": 2}},
        {"prune": {"method": "magnitude", "ratios": {"layer1.0.conv1": 0.5}, "epochs": 2}},
        {"quantize": {"method": "lsq_sam", "epochs": 2, "flatness_map": False, "sharpness": False}},
    ],
}  # fmt: skip
SPACE: dict[str, Any] = {
    "stages.1.prune.ratios": {"per_group": [0.0, 0.5]},
    "stages.2.quantize.bits": {"per_layer": [2, 4, 8]},
    "stages.2.quantize.rho": {"low": 0.02, "high": 0.5, "log": True},
}


def search(folder: Any, **keys: Any) -> Search:
    """A search in ``folder``."""
    usual = {"objectives": {"robust": "maximize", "bytes": "minimize"}, "n_trials": 6, "warm_start": 3}
    return parse_search({"recipe": RECIPE, "space": SPACE, "output_dir": str(folder), **usual, **keys})
