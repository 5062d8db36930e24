"""A recipe small enough for tests: every stage runs, in seconds, on real digits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
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


def under_torchrun(test: Path, folder: Path) -> list[Any]:
    """What two processes that run ``work(folder)`` of the file ``test`` leave there as ``rank.pt``."""
    script = folder / "work.py"
    script.write_text(f"from pathlib import Path\nfrom {test.stem} import work\nwork(Path({str(folder)!r}))\n")
    path = os.pathsep.join([str(test.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
