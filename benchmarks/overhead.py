"""What a run costs beside its training: EfficientNet-Lite0, 96 pixels, 320 images, one epoch of W4A8, export.

    python -m benchmarks.overhead [--quick] [--check] [--threads 1]

Five processes, each alone: the run as ``flatcompress run`` makes it (the stage quantize with its defaults, then
export), the same for 10 epochs, and for one with ``measure: off``; ``plain``, a loop that imports torch and the
quantized layers only and takes the same passes on the same batches; and ``import``, which imports flatcompress and
ends. ``part`` lists where the run's time went, from its ledger. Seconds are CPU time of one thread, which other users
of the machine hardly lengthen; peak memory is the process's. Each side runs once before, on few images: Python compiles
modules the first time that they are loaded, which belongs to installing. --quick trains on 96 images, of which little
can be said.

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
    "calibration": "one forward pass of images that cost an eighth of the training, 512 at most; it decides scales",
    "how far each layer may move": "the map: products with the Hessian on 4 images or more, and grids of each layer",
    "BatchNorm statistics": "one forward pass an epoch, at most ten batches and an eighth of the training; it decides",
    "validation": "after every epoch",
    "scales without ties": "lowers the network twice",
    "reading the data, trying every stage on a copy": "a large part of it is torch.export, once a run",
    "proof": "the trained network, its reference, the file twice, and roundoff, on 32 images of the test part or more",
    "metrics": "the network and the file on the whole test and held-out parts",
    "metrics under corruption": "16 images of one severity of each kind or more, both",
    "float file and latencies": "writes the float network, loads both files, times each for 50 ms or 10 rounds",
    "the float model's predictions": "on the whole test part",
    "sharpness of each layer": "4 layers on 8 images or more",
    "sharpness": "16 images or more",
}
DECIDES = ("placing the quantizers", "calibration", "BatchNorm statistics", "validation", "scales without ties")
WRITES = (
    "reading the data, trying every stage on a copy", "writing the file", "float file and latencies",
    "the preview of the data", "report and model card", "checkpoints of the stages", "examples for the report",
)  # fmt: skip
WHOLE = ("metrics", "the float model's predictions")
INTRO = """# What a run costs beside its training

Written by `python -m benchmarks.overhead`: EfficientNet-Lite0, 96 pixels, {count} images, one epoch of W4A8 and, in the
last two columns of figures, {long}; then export, on one thread ({processor}). Seconds are processor time; the import is
before the run and in no other row.

"""
AFTER = """
One epoch is a pass over {count} images and takes {training:.1f} s. Of the {beside:.1f} s beside it,

- {decides:.1f} s decide the network: calibration, statistics, validation, placing and moving scales;
- {writes:.1f} s try, write and load it, once a run; torch.export, which traces each operator in Python, is a
  large part;
- {whole:.1f} s put the whole of the test and held-out parts through the network and its file;
- {sampled:.1f} s measure samples, the fewest that there are: sharpness, the map, corruption, the proof.

With `measure: off`, which leaves of the last the proof, the share is {off:.2f}: a floor above half of so short
a training. It consists of the trial of all stages with torch.export's trace, of writing, loading and proving the files,
of one forward pass of the test set through the network and one through each file, and of the passes that the network's
scales and statistics come from.

After {long} epochs the share is {far:.2f}. What is done once a run counts for little by then, `measure: quick` takes
its quarter of the training, and validation and statistics come after each epoch. Ten batches, as many as {count} images
make, are what statistics are estimated on: a whole forward pass an epoch here, a tenth of one in an epoch of a hundred.

Targets: {missed}. Peak memory is {memory:.2f} of the plain loop's. It is in the training, which begins
with the modules of the pipeline in memory, where the plain loop has those of the quantized layers.
"""
SIDE, BATCH = 96, 32


def the_data(count: int) -> Any:
    """Drawn figures, in two classes, ``count`` of them to train on."""
    from flatcompress import data

    sizes = {"train_count": count, "val_count": 64, "test_count": 128}
    return data.load("drawn-figures", size=SIDE, **sizes)


def the_run(count: int, epochs: int = 1, measure: str = "quick") -> dict[str, Any]:
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
        pipeline = Pipeline(model, bundle, stages, batch_size=BATCH, device="cpu", threads=1, measure=measure)
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


def the_unmeasured_run(count: int) -> dict[str, Any]:
    """One epoch, with ``measure: off``."""
    return the_run(count, measure="off")


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


SIDES = {"run": the_run, "long run": the_long_run, "unmeasured run": the_unmeasured_run, "plain": the_plain_loop,
         "import": the_import}  # fmt: skip


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


def page(rows: Sequence[Mapping[str, Any]], failures: Sequence[str], count: int, shares: Mapping[str, float]) -> str:
    """docs/results/overhead.md."""
    lines = [
        f"| part | seconds | of the training | {LONG} epochs | of the training | why |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = str(row["part"])
        keys = ("seconds", "of_training", "long_seconds", "long_of_training")
        figures = " | ".join("" if row.get(key) is None else f"{row[key]:.2f}" for key in keys)
        shown = name.strip() if not name.startswith("    ") else f"- {name.strip()}"
        lines.append(f"| {shown} | {figures} | {WHY.get(name.strip(), '')} |")
    took = {str(row["part"]).strip(): float(row["seconds"]) for row in rows}
    groups = {
        name: sum(took.get(part, 0.0) for part in parts)
        for name, parts in (("decides", DECIDES), ("writes", WRITES), ("whole", WHOLE))
    }
    told = {"count": count, "long": LONG, "processor": processor(), "training": took["training"], **groups}
    told |= {"beside": took["all that is not training"]}
    told |= {"sampled": took["all that is not training"] - sum(groups.values()), "far": shares["long"]}
    told |= {"missed": "; ".join(failures) or "all met", "memory": shares["memory"], "off": shares["off"]}
    return INTRO.format(**told) + "\n".join(lines) + "\n" + AFTER.format(**told)


def parts_of(run: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of every part of a run, in the order of the table, with what is inside the stages after them."""
    told = {**run["parts"], "not told": run["total"] - run["training"] - sum(run["parts"].values())}
    found: dict[str, float] = {}
    for name, seconds in sorted(told.items(), key=lambda item: -item[1]):
        found[f"  {name}"] = seconds
        for inner, took in run["within"] if name == "the stages beside their epochs" else ():
            found[f"    {inner}"] = found.get(f"    {inner}", 0.0) + took
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the sides, check the targets; returns the exit code."""
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
    run, far, plain = sides["run"], sides["long run"], sides["plain"]
    beside = {name: sides[name]["total"] - sides[name]["training"] for name in ("run", "long run", "unmeasured run")}
    shares = {"time": beside["run"] / run["training"], "long": beside["long run"] / far["training"],
              "off": beside["unmeasured run"] / sides["unmeasured run"]["training"],
              "memory": run["peak"] / plain["peak"]}  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"part": "training", "seconds": run["training"], "of_training": 1.0, "long_seconds": far["training"],
         "long_of_training": 1.0, "peak_MB": run["peak"] / 1e6},
        {"part": "plain loop", "seconds": plain["training"], "of_training": plain["training"] / run["training"],
         "peak_MB": plain["peak"] / 1e6},
        {"part": "import", "seconds": sides["import"]["total"], "peak_MB": sides["import"]["peak"] / 1e6},
        {"part": "all that is not training", "seconds": beside["run"], "of_training": shares["time"],
         "long_seconds": beside["long run"], "long_of_training": shares["long"]},
    ]  # fmt: skip
    later = parts_of(far)
    for part, seconds in parts_of(run).items():
        there = {} if part not in later else {
            "long_seconds": later[part], "long_of_training": later[part] / far["training"],
        }  # fmt: skip
        rows.append({"part": part, "seconds": seconds, "of_training": seconds / run["training"], **there})
    failures = [
        f"{what} is {shares[key]:.2f} {of}, target {most}"
        for key, most, what, of in (
            ("time", MOST_TIME, "all that is not training", "of the training"),
            ("memory", MOST_MEMORY, "peak memory", "of the plain loop's"),
        )
        if shares[key] > most
    ]
    if not options.quick:
        PAGE.write_text(page(rows, failures, count, shares))
    return finish("overhead", rows, failures, options, load=os.getloadavg()[0], **shares)


if __name__ == "__main__":
    raise SystemExit(main())
