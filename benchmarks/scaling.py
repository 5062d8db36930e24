"""How cost grows: seconds and memory of every stage against what a run may have more of.

    python -m benchmarks.scaling [--quick] [--check] [--restart | --kept] [--threads 1]

One run (train, prune, sparsify, quantize, export; an epoch each) of a chain of convolutions, in a process of its own
for every row, varied along one axis at a time: parameters (width), layers (each is a channel group of its own),
images, image size, classes, processes (torchrun, gloo) and a sweep's workers. Seconds are the process's CPU time where
there is one, so that other users of the machine count little, wall time for processes and workers. ``survey`` looks
for channel groups of a network with attention over channels by its width. ``listing`` is the reading of an image
folder's headers.
An exponent is the slope of log seconds over log axis between the two largest rows, where constants matter least.
What was measured is kept, and a run that was stopped goes on. Writes docs/results/scaling.md.

Targets
  1. no stage grows faster than linearly in layers or images (exponent at most 1.15).
  2. survey grows at most quadratically in the width of attention over channels (exponent at most 2.15).
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._common import arguments, finish, kept, markdown, resumable

BASE = {"width": 16, "layers": 6, "images": 256, "side": 16, "classes": 4}
AXES: dict[str, list[int]] = {
    "width": [16, 32, 64],
    "layers": [6, 12, 24],
    "images": [256, 512, 1024],
    "side": [16, 24, 32],
    "classes": [4, 16, 64],
}
WIDTHS = [128, 256, 512]
FILES = [1000, 2000, 4000]
TOGETHER = {"processes": [1, 2], "workers": [1, 2]}
MOST, MOST_SURVEY = 1.15, 2.15
PORT = 29713
PAGE = Path(__file__).parent.parent / "docs" / "results" / "scaling.md"


class Chain(nn.Module):
    """[B, 3, H, W] -> logits [B, classes]: ``layers`` convolutions of ``width`` channels, with BatchNorm."""

    def __init__(self, width: int, layers: int, classes: int) -> None:
        super().__init__()
        widths = [3, *[width] * layers]
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
              for a, b in pairwise(widths))
        )  # fmt: skip
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


class Mixing(nn.Module):
    """Attention over channels (arXiv 1910.03151) behind every second convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.mix = nn.Conv1d(1, 1, 3, padding=1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.convs[1](self.convs[0](x).relu())
        shares = self.mix(y.mean((2, 3)).view(len(y), 1, -1)).sigmoid().view(len(y), -1, 1, 1)
        return self.head((x + y * shares).mean((2, 3)))


def a_run(folder: Path, width: int, layers: int, images: int, side: int, classes: int) -> dict[str, Any]:
    """CPU seconds of every stage, and of what is measured after it; the process's peak in bytes.

    folder: the same for all processes. Nothing is said by others than the first.
    """
    from flatcompress import Pipeline

    torch.set_num_threads(1)
    torch.manual_seed(0)

    def part(n: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(n) % classes
        return torch.randn(n, 3, side, side) + y.view(-1, 1, 1, 1) / classes, y

    bundle = {"train": part(images), "val": part(classes), "test": part(max(64, classes))}
    short = {"epochs": 1, "select": "last"}
    stages = [
        {"train": {**short, "method": "sam"}},
        {"prune": {**short, "ratio": 0.25}},
        {"sparsify": {**short, "sparsity": 0.5}},
        {"quantize": {**short}},
        {"export": {}},
    ]
    clock = time.process_time
    pipeline = Pipeline(Chain(width, layers, classes), bundle, stages, batch_size=32, device="cpu", threads=1)
    begun, wall = clock(), time.perf_counter()
    result = pipeline.run(folder / "run")
    total, walls = clock() - begun, time.perf_counter() - wall
    if os.environ.get("RANK", "0") != "0":
        return {}
    log = (result.folder / "log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in log]
    busy = total / max(walls, 1e-9)  # wall seconds of the log as CPU time
    names, seconds = [next(iter(stage)) for stage in stages], {}
    for name, event in zip(names, (e for e in events if e["event"] == "spent")):
        parts = dict(event["seconds"])
        seconds[name] = parts.pop("the stage") * busy
        seconds[f"measuring after {name}"] = sum(parts.values()) * busy
    parameters = sum(p.numel() for p in Chain(width, layers, classes).parameters())
    return {"parameters": parameters, "seconds": seconds, "all": total, "wall": walls}


def a_survey(width: int) -> dict[str, Any]:
    """CPU seconds to find the channel groups of `Mixing`."""
    from flatcompress import prune

    torch.set_num_threads(1)
    model, example = Mixing(width), torch.rand(1, 3, 8, 8)
    prune.survey(Mixing(8), example)
    begun = time.process_time()
    prune.survey(model, example)
    return {"seconds": {"survey": time.process_time() - begun}}


def a_listing(files: int) -> dict[str, Any]:
    """CPU seconds to list a folder of ``files`` images that do not fit in memory."""
    from PIL import Image

    from flatcompress import data
    from flatcompress.data.images import reading

    with tempfile.TemporaryDirectory() as folder:
        for i in range(files):
            (Path(folder) / str(i % 4)).mkdir(exist_ok=True)
            Image.new("RGB", (64, 64), (i % 256, 0, 0)).save(Path(folder) / str(i % 4) / f"{i}.jpg")
        reading.MOST_BYTES = 0
        begun = time.process_time()
        data.load("folder", path=folder, size=32, mean=[0.5] * 3, std=[0.2] * 3, corruptions="none")
        return {"seconds": {"listing": time.process_time() - begun}}


def a_sweep(workers: int) -> dict[str, Any]:
    """Wall seconds of four short runs on so many workers."""
    from flatcompress.sweep import pool
    from flatcompress.sweep.spec import parse_sweep

    recipe = {"device": "cpu", "threads": 1, "data": {"name": "styled-shapes", "size": 16, "corruptions": "none"},
              "model": {"name": "resnet8"}, "measure": "off", "stages": [{"train": {"epochs": 1}}]}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        spec = {"name": "scaling", "output_dir": folder, "jobs": workers, "recipe": recipe, "seeds": [0, 1, 2, 3],
                "methods": [{"name": "sam", "stages": recipe["stages"]}]}  # fmt: skip
        begun = time.perf_counter()
        pool.run_sweep(parse_sweep(spec, "scaling"), pool.stderr)
        return {"seconds": {"sweep of 4": time.perf_counter() - begun}}


def alone(kind: str, sizes: Mapping[str, int], processes: int = 1) -> dict[str, Any]:
    """What the part ``kind`` measures, in processes of its own, with the first one's peak memory."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(PORT)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        side = ["-m", "benchmarks.scaling", "--side", kind, json.dumps(dict(sizes)), str(out)]
        command = [sys.executable, "-W", "ignore", *(launch if processes > 1 else []), *side]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise RuntimeError(f"{kind} {dict(sizes)}: {done.stderr[-2000:]}")
        return json.loads(out.read_text())  # type: ignore[no-any-return]


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "run": a_run,
    "survey": a_survey,
    "listing": a_listing,
    "sweep": a_sweep,
}


def measured(axis: str, value: int) -> dict[str, Any]:
    """One row: the axis at one value, everything else at its base."""
    if axis in AXES:
        return alone("run", {**BASE, axis: value})
    if axis == "processes":
        found = alone("run", {**BASE, "images": 512}, value)
        return {**found, "seconds": {"all five stages, wall": found["wall"]}}
    kind, name = {"attention": ("survey", "width"), "files": ("listing", "files"), "workers": ("sweep", "workers")}[
        axis
    ]
    return alone(kind, {name: value})


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Exponent between the last two points of (axis, seconds)."""
    (a, x), (b, y) = points[-2:]
    return math.log(max(y, 1e-9) / max(x, 1e-9)) / math.log(b / a)


def growth(found: Mapping[tuple[str, int], dict[str, Any]], values: Mapping[str, list[int]]) -> list[dict[str, Any]]:
    """A row for every axis and stage: seconds at each value, peak memory at the ends, the exponent."""
    rows = []
    for axis, steps in values.items():
        runs = [found[axis, value] for value in steps]
        at = [run["parameters"] for run in runs] if axis == "width" else steps
        for name in runs[0]["seconds"]:
            seconds = [run["seconds"].get(name, 0.0) for run in runs]
            if max(seconds) < 0.05:
                continue  # of what takes no time nothing can be fitted
            rows.append({
                "axis": "parameters" if axis == "width" else axis, "from": at[0], "to": at[-1], "part": name,
                "first_s": seconds[0], "last_s": seconds[-1], "exponent": slope(list(zip(at, seconds))),
                "first_MB": runs[0]["peak"] / 1e6, "last_MB": runs[-1]["peak"] / 1e6,
            })  # fmt: skip
    return rows


def missed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What grows faster than the targets allow, as sentences; what takes less than half a second is left out."""
    failures = []
    for row in rows:
        most = {"layers": MOST, "images": MOST, "files": MOST, "attention": MOST_SURVEY}.get(row["axis"])
        if most is not None and row["exponent"] > most and row["last_s"] > 0.5:
            failures.append(f"{row['part']} grows with {row['axis']} to the power {row['exponent']:.2f}, target {most}")
    return failures


INTRO = """# How cost grows

Written by `python -m benchmarks.scaling`: a chain of convolutions, one epoch a stage, one thread, one axis varied at a
time from {base}. Seconds are CPU time, wall time for processes and workers. An exponent is the slope between the two
largest values: 1 is linear. *parameters* vary by the width, so what follows the multiply-accumulates has about 1 there.

"""
LARGE = """
## What ImageNet on 8 GPUs would take

No GPU was measured here: this is arithmetic on the rows above and on `benchmarks.loading`, with r for the images a
second that one GPU trains (measure it with one epoch of 2,000 images).

- Listing 1.28 million files: {listing:.0f} s of CPU at {per_file:.2f} ms a file, once, before the first step.
- An epoch of a method with p passes: 1.28e6 p / (8 r) s; 90 epochs are
  90 times it, since no stage is above linear in images but where this page says so.
- Loading: r / {per_core:.0f} cores for each GPU at the rate of `benchmarks.loading` (JPEG decoded, resized, augmented).
- A loading process holds a table of 12 numbers a sample and epoch: 61 MB.
- Measuring takes a quarter of the training at most (`measure: quick`), whatever the size.
"""


def page(rows: Sequence[Mapping[str, Any]], failures: Sequence[str]) -> str:
    """docs/results/scaling.md."""
    text = INTRO.format(base=", ".join(f"{k} {v}" for k, v in BASE.items())) + markdown(rows)
    steep = failures or ["nothing"]
    text += (
        "\n\nFaster than linear in layers, images or files, or than quadratic in attention's width, and above half a "
    )
    text += "second: " + "; ".join(steep) + ".\n"
    listing = next((r for r in rows if r["axis"] == "files"), None)
    loading = Path(__file__).parent / "results" / "loading.json"
    if listing is None or not loading.exists():
        return text
    rates = {(r["part"], r["what"]): r.get("images_a_second") for r in json.loads(loading.read_text())["rows"]}
    core = 1 / (1 / rates["decode", "ours"] + 1 / rates["augment", "domainbed"])
    each = listing["last_s"] / listing["to"]
    return text + LARGE.format(listing=each * 1.28e6, per_file=each * 1e3, per_core=core)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is not measured yet, fit, write the page; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--side"]:
        place = [Path(given[3]).parent] if given[1] == "run" else []
        found = KINDS[given[1]](*place, **json.loads(given[2]))
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if os.environ.get("RANK", "0") == "0":
            Path(given[3]).write_text(json.dumps(found))
        return 0
    options = arguments(__doc__, argv, resumable)
    store = kept("scaling", options)
    values = {**AXES, "attention": WIDTHS, "files": FILES, **TOGETHER}
    values = {axis: steps[:2] for axis, steps in values.items()} if options.quick else values
    found = {}
    for axis, steps in values.items():
        for value in steps:
            name = "base" if BASE.get(axis) == value else f"{axis} {value}"
            row = store.get(name, lambda axis=axis, value=value: measured(axis, value))
            if row is not None:
                found[axis, value] = row
    whole = {axis: steps for axis, steps in values.items() if all((axis, value) in found for value in steps)}
    rows = growth(found, whole)
    failures = missed(rows)
    if not options.quick:
        PAGE.write_text(page(rows, failures))
    return finish("scaling", rows, failures, options, load=os.getloadavg()[0])


if __name__ == "__main__":
    raise SystemExit(main())
