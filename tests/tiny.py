"""A recipe small enough for tests: every stage runs, in seconds, on real digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def recipe(**changes: Any) -> dict[str, Any]:
    """All four stages on few digits with a thin resnet8; ``changes`` replace top-level keys."""
    base: dict[str, Any] = {
        "name": "tiny",
        "seed": 0,
        "device": "cpu",
        "threads": 1,
        "data": {"name": "rotated-digits", "held_out": "75", "size": 8, "copies": 1, "batch_size": 128}
        | {"corruptions": ["contrast/3"], "corrupted_count": 64},
        "model": {"name": "resnet8"},
        "stages": [
            {"train": {"method": "sam", "rho": 0.05, "epochs": 2}},
            {"prune": {"method": "adasap", "ratio": 0.5, "epochs": 2}},
            {"quantize": {"method": "gaqat", "K": 5, "weight_bits": 4, "activation_bits": 4, "epochs": 1}},
            {"export": {"profile": "packed"}},
        ],
    }
    return base | changes


def write(folder: Path, raw: dict[str, Any] | None = None) -> Path:
    """Write a recipe whose run folder is below ``folder``; returns its path."""
    raw = raw or recipe()
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder / "runs"), **raw}, sort_keys=False))
    return path
