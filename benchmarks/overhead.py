"""What a run costs beside its training: EfficientNet-Lite0, 96 pixels, 320 images, one epoch of W4A8, export.

    python -m benchmarks.overhead [--quick] [--check] [--threads 1]

Three processes, each alone: the run as ``flatcompress run`` makes it (the stage quantize with its defaults, then
export); ``plain``, a loop that imports torch and the quantized layers only and takes the same passes on the same
batches; and ``import``, which imports flatcompress and ends. ``part`` lists where the run's time went, from its ledger.
Seconds are CPU time of one thread, which other users of the machine hardly lengthen; peak memory is the process's.
Each side runs once before, on few images: Python compiles modules the first time that they are loaded, which belongs to
installing. --quick trains on 96 images, of which little can be said.

Targets
  1. all that is not training at most 0.5 of the training.
  2. peak memory at most 1.3 of the plain loop's.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._common import arguments, finish
from flatcompress.environment import processor

MOST_TIME, MOST_MEMORY = 0.5, 1.3
LONG = 10  # epochs
PAGE = Path(__file__).parent.parent / "docs" / "results" / "overhead.md"
WHY = {
    "import": "the package, without torch",
    "placing the quantizers": "the graph is known from the dry run by now",
    "calibration": "one forward pass of up to 512 training images; it decides the scales, so `measure` leaves it alone",
    "how far each layer may move": "the map: products with the Hessian on 8 images, and 60 grids for each layer",
    "BatchNorm statistics": "one forward pass of 10 batches, by which epochs are judged; it decides the weights' file",
    "validation": "after the epoch",
    "scales without ties": "lowers the network once",
    "reading the data, trying every stage on a copy": "most of it is torch.export, once a run",
    "proof": "the trained network, its reference, the file twice, and roundoff on samples of the test part",
    "metrics": "the test and the held-out part, all of both",
    "metrics under corruption": "32 images of one severity of each kind, the least that is measured",
    "float file and latencies": "writes the float network, loads each file several times, times 30 rounds",
    "sharpness of each layer": "8 layers on 16 images, the least that is measured",
    "sharpness": "32 images, the least that is measured",
}
INTRO = """# What a run costs beside its training

Written by `python -m benchmarks.overhead`: EfficientNet-Lite0, 96 pixels, {count} images, one epoch of W4A8, then
export, on one thread ({processor}). Seconds are processor time; the import is before the run and in no other row.

"""
AFTER = """
The training is one pass over {count} images and takes {training:.1f} s. More than half of the rest is forward passes on
samples that are the least there may be, or that decide the network itself; most of what is left is done once a run,
however long that trains. Longer training has a validation and an estimate of the statistics more for each epoch, and
samples for the measuring until that is a quarter of it (`measure: quick`).

Targets: {missed}. Peak memory is {memory:.2f} of the plain loop's. It is in the training, which begins
with the modules of the pipeline in memory, where the plain loop has those of the quantized layers.
"""
SIDE, BATCH = 96, 32


def the_data(count: int) -> Any:
    """Drawn figures, in two classes, ``count`` of them to train on."""
    from flatcompress import data

    sizes = {"train_count": count, "val_count": 64, "test_count": 128}
    return data.load("drawn-figures", size=SIDE, **sizes)


def the_run(count: int, epochs: int = 1) -> dict[str, Any]:
    """Train at W4A8, export, and say where the seconds went."""
    time.monotonic = time.process_time  # the clock of the ledger, before anybody imports it
    from benchmarks._lite0 import Lite0
    from flatcompress import Pipeline
    from flatcompress.environment import keep_freed_memory

    keep_freed_memory()  # as the command does
    seen: list[dict[str, Any]] = []
    bundle = the_data(count)
    model = Lite0(len(bundle.classes))
    stages = [{"quantize": {"weight_bits": 4, "activation_bits": 8, "epochs": epochs}}, {"export": {}}]
    with tempfile.TemporaryDirectory() as folder:
        pipeline = Pipeline(model, bundle, stages, batch_size=BATCH, device="cpu", threads=1)
        begun = time.process_time()
        result = pipeline.run(folder)
        total = time.process_time() - begun
        for line in (result.folder / "log.jsonl").read_text().splitlines():
            seen.append(json.loads(line))
    training = sum(e["seconds"] for e in seen if e["event"] == "epoch")
    parts: dict[str, float] = {}
    for event in seen:
        if event["event"] == "spent":
            for name, value in event["seconds"].items():
                parts[name] = parts.get(name, 0.0) + value
    parts["the stages beside their epochs"] = parts.pop("the stage") - training
    within = [item for e in seen if e["event"] == "spent" for item in e.get("within", {}).items()]
    return {
        "total": total,
        "training": training,
        "parts": parts,
        "within": within,
        "passes": result.ledger[-2]["passes"],
    }


def the_long_run(count: int) -> dict[str, Any]:
    """The same for `LONG` epochs."""
    return the_run(count, LONG)


def the_plain_loop(count: int) -> dict[str, Any]:
    """The same batches, once forward and backward a step through the same quantized layers, and the same optimizer."""
    import torch

    from benchmarks._lite0 import Lite0
    from flatcompress import quant
    from flatcompress.environment import keep_freed_memory
    from flatcompress.training.batches import epoch_batches, loader

    torch.set_num_threads(1)
    keep_freed_memory()
    bundle = the_data(count)
    batches = epoch_batches(len(bundle.train), BATCH, 0, 0)
    model = Lite0(len(bundle.classes)).to(memory_format=torch.channels_last)
    first, _ = next(iter(loader(bundle.train, batches)))
    quant.quantize(model, 4, 8, example_input=first[:1])
    quant.calibrate(model, [first])
    model.train()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    begun = time.process_time()
    for x, y in loader(bundle.train, batches):
        adamw.zero_grad()
        torch.nn.functional.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y).backward()
        adamw.step()
    return {"training": time.process_time() - begun}


def the_import(count: int) -> dict[str, Any]:
    """Nothing but the import."""
    begun = time.process_time()
    import flatcompress.pipeline  # noqa: F401

    return {"total": time.process_time() - begun}


SIDES = {"run": the_run, "long run": the_long_run, "plain": the_plain_loop, "import": the_import}


def alone(side: str, count: int, bytecode: str) -> dict[str, Any]:
    """What ``side`` measured in a process of its own, with that process's peak memory in bytes.

    bytecode: the folder for compiled modules.
    """
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.overhead", "--side", side, str(count)]
    given = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    given |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": bytecode}
    done = subprocess.run(command, capture_output=True, text=True, env=given)
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def page(rows: Sequence[Mapping[str, Any]], failures: Sequence[str], count: int, memory: float) -> str:
    """docs/results/overhead.md."""
    lines = ["| part | seconds | of the training | why |", "|---|---|---|---|"]
    for row in rows:
        name = str(row["part"])
        share = "" if row.get("of_training") is None else f"{row['of_training']:.2f}"
        shown = name.strip() if not name.startswith("    ") else f"- {name.strip()}"
        lines.append(f"| {shown} | {row['seconds']:.2f} | {share} | {WHY.get(name.strip(), '')} |")
    missed = "; ".join(failures) or "all met"
    after = AFTER.format(count=count, training=rows[0]["seconds"], missed=missed, memory=memory)
    return INTRO.format(count=count, processor=processor()) + "\n".join(lines) + "\n" + after


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the three sides, check the targets; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--side"]:
        found = SIDES[given[1]](int(given[2]))
        print(json.dumps({**found, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
        return 0
    options = arguments(__doc__, argv)
    count = 96 if options.quick else 320
    with tempfile.TemporaryDirectory() as bytecode:
        for side in SIDES:
            alone(side, BATCH, bytecode)
        sides = {side: alone(side, count, bytecode) for side in SIDES}
    run, plain = sides["run"], sides["plain"]
    beside = run["total"] - run["training"]
    shares = {"time": beside / run["training"], "memory": run["peak"] / plain["peak"]}
    rows: list[dict[str, Any]] = [
        {"part": "training", "seconds": run["training"], "of_training": 1.0, "peak_MB": run["peak"] / 1e6},
        {"part": "plain loop", "seconds": plain["training"], "of_training": plain["training"] / run["training"],
         "peak_MB": plain["peak"] / 1e6},
        {"part": "import", "seconds": sides["import"]["total"], "peak_MB": sides["import"]["peak"] / 1e6},
        {"part": "all that is not training", "seconds": beside, "of_training": shares["time"]},
    ]  # fmt: skip
    told = {**run["parts"], "not told": beside - sum(run["parts"].values())}
    for name, seconds in sorted(told.items(), key=lambda item: -item[1]):
        rows.append({"part": f"  {name}", "seconds": seconds, "of_training": seconds / run["training"]})
        for inner, took in run["within"] if name == "the stages beside their epochs" else ():
            rows.append({"part": f"    {inner}", "seconds": took, "of_training": took / run["training"]})
    failures = [
        f"{what} is {shares[key]:.2f} {of}, target {most}"
        for key, most, what, of in (
            ("time", MOST_TIME, "all that is not training", "of the training"),
            ("memory", MOST_MEMORY, "peak memory", "of the plain loop's"),
        )
        if shares[key] > most
    ]
    if not options.quick:
        PAGE.write_text(page(rows, failures, count, shares["memory"]))
    return finish("overhead", rows, failures, options, load=os.getloadavg()[0], **shares)


if __name__ == "__main__":
    raise SystemExit(main())
