"""An epoch of ours against one of timm's training script, on the same network and JPEG files.

    python -m benchmarks.timm_epoch --timm CHECKOUT --python PYTHON [--quick] [--check] [--threads 1]

CHECKOUT: a folder with timm's source, whose ``train.py`` is run; PYTHON: the interpreter of an environment with timm
and torchvision, which this project does not need. MobileNetV2 and ResNet-18 at 96 pixels, 320 JPEG files of their
size in ten classes and 64 to validate on, batch 32, SGD with momentum, float32, no augmentation, no loading processes.
Each side runs as a user runs it, for one epoch and for three, in turns; an epoch's seconds are half the difference of
the processor time of the two, so that imports and starting count for nothing. ``sam``: ours with `method: sam`, two
passes a step. Medians over rounds.

Target
  1. a plain epoch of ours takes at most as long as timm's.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from benchmarks._common import arguments, finish

NETWORKS = {"mobilenet_v2": ("mobilenetv2_100", 96), "resnet18": ("resnet18", 96)}  # ours: timm's, pixels of a side
COUNTS = {"train": 320, "val": 64}
BATCH, EPOCHS = 32, (1, 3)
CLASSES = 10


def pictures(folder: Path, side: int) -> None:
    """JPEG files of smooth noise whose brightness says the class."""
    rng = np.random.default_rng(0)
    for part, count in COUNTS.items():
        for i in range(count):
            kind = i % CLASSES
            path = folder / part / f"class{kind}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = np.clip(rng.normal(60 + 15 * kind, 40, (12, 12, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)


def recipe(data: Path, folder: Path, name: str, side: int, method: str, epochs: int) -> Path:
    """Ours: one train stage, nothing measured after it but the metrics."""
    raw = {
        "name": f"{name}-{method}-{epochs}", "output_dir": str(folder), "device": "cpu", "threads": 1, "measure": "off",
        "data": {"name": "folder", "path": str(data), "size": side, "batch_size": BATCH, "corruptions": "none"},
        "model": {"name": name},
        "stages": [{"train": {"method": method, "epochs": epochs, "optimizer": {"name": "sgd", "lr": 0.01}}}],
    }  # fmt: skip
    path = folder / f"{name}-{method}-{epochs}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def commands(options: argparse.Namespace, data: Path, folder: Path, name: str, epochs: int) -> dict[str, list[str]]:
    """What a user types on each side."""
    theirs, side = NETWORKS[name]
    ours = [sys.executable, "-m", "flatcompress", "run", "--restart", "--quiet"]
    flags = (
        f"--train-split train --val-split val --model {theirs} --num-classes {CLASSES} --img-size {side} -b {BATCH} "
    )
    flags += f"--epochs {epochs} --opt sgd --lr 0.01 --sched cosine --warmup-epochs 0 --device cpu --workers 0 "
    flags += f"--no-prefetcher --no-aug --data-dir {data} --output {folder / 'timm'}"
    found = {"timm": [str(options.python), str(options.timm / "train.py"), *flags.split()]}
    for kind, method in (("ours", "none"), ("sam", "sam")):
        found[kind] = [*ours, str(recipe(data, folder, name, side, method, epochs))]
    return found


def seconds(command: Sequence[str], threads: int) -> float:
    """Processor time of ``command`` and its children. RuntimeError with its last words where it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{command[1]}: {(done.stderr or done.stdout)[-1500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def row_of(options: argparse.Namespace, name: str, rounds: int) -> dict[str, Any]:
    """One network: seconds of an epoch on each side."""
    epochs: dict[str, list[float]] = {"timm": [], "ours": [], "sam": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pictures(folder / "data", NETWORKS[name][1])
        for _ in range(rounds):
            few, many = (commands(options, folder / "data", folder, name, n) for n in EPOCHS)
            for kind, found in epochs.items():
                spent = [seconds(given[kind], options.threads) for given in (few, many)]
                found.append((spent[1] - spent[0]) / (EPOCHS[1] - EPOCHS[0]))
    medians = {kind: statistics.median(found) for kind, found in epochs.items()}
    ratios = {kind: statistics.median(a / b for a, b in zip(epochs[kind], epochs["timm"])) for kind in ("ours", "sam")}
    return {"network": name, **{f"{kind}_s": value for kind, value in medians.items()},
            **{f"{kind}/timm": value for kind, value in ratios.items()}}  # fmt: skip


def _own(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--timm", type=Path, required=True, help="a folder with timm's source")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="an interpreter that has timm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    options = arguments(__doc__, argv, _own)
    names = list(NETWORKS)[:1] if options.quick else list(NETWORKS)
    rows = [row_of(options, name, 1 if options.quick else 3) for name in names]
    slow = [
        f"{row['network']}: a plain epoch takes {row['ours/timm']:.2f} of timm's"
        for row in rows
        if row["ours/timm"] > 1
    ]
    return finish("timm_epoch", rows, slow, options, batch=BATCH, images=COUNTS["train"])


if __name__ == "__main__":
    sys.exit(main())
