"""A latency budget of pruning: what was asked, what the table said, and what the exported file takes.

    python -m benchmarks.latency_budget [--quick] [--check]

ResNet-18 and MobileNetV2 on 3 x 224 x 224, batch 1, onnxruntime's CPU provider, 1 thread. A latency table is measured
anew; the network is cut to five shares of its dense int8 latency (``prune`` with the table as cost, as the recipe's
``latency`` does), quantized at W8A8 and exported; then all files, the dense ones too, are timed against one another in
interleaved rounds, CPU time, medians. For scale, beside them: half of the MACs and half of the channels, in steps of 16
channels (the MACs also in the default steps), in float and int8, and one of the latency cuts at W4A4. Weights are
initialised, not trained: latency does not depend on their values.

The shares are of the dense int8 network: the table's own figure for the estimate, the same rounds' for the measured
file, since the machine does not run at one speed from one minute to the next; ``ms`` and ``table ms`` are as read.

Targets
  1. asked, estimated and measured share within 10 % of each other, every budget, both networks.
  2. ResNet-18 with 50 % of its MACs cut: float at least 2.5 times, int8 at least 5 times as fast as dense fp32.

``most`` in the JSON says what target 2 can reach in float at all: the speed of the dense fp32 file, profiled kernel by
kernel, if half of its MACs left where they are slowest, a kernel's time shrank with its MACs, and all else were free.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import nn

from benchmarks._common import arguments, finish
from flatcompress import models, prune, quant
from flatcompress.latency.table import LatencyTable
from flatcompress.onnx_export import export
from flatcompress.onnx_export.runtime import kernel_time, latency

WITHIN = 0.10
HALVES: dict[str, dict[str, Any]] = {
    "half the MACs, default steps": {"macs": 0.5},
    "half the MACs": {"macs": 0.5, "round_to": 16},
    "half the channels": {"ratio": 0.5, "round_to": 16},
}
FASTER = {"half the MACs, fp32": 2.5, "half the MACs, int8": 5.0}


@dataclass(frozen=True)
class Case:
    """A network, its input, and the shares of its dense int8 latency that are asked for."""

    name: str
    shape: tuple[int, int, int]
    budgets: tuple[float, ...]
    classes: int = 1000
    beside: bool = True  # the files that the budgets are seen beside

    def example(self) -> torch.Tensor:
        """Normalised random images."""
        return torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(0))

    def built(self) -> nn.Module:
        """The float network."""
        return models.build(self.name, num_classes=self.classes, input_shape=self.shape, seed=0).eval()


FULL = (
    Case("resnet18", (3, 224, 224), (0.8, 0.65, 0.5, 0.4, 0.3)),
    Case("mobilenet_v2", (3, 224, 224), (0.9, 0.8, 0.7, 0.6, 0.5)),
)
QUICK = (Case("resnet18", (3, 96, 96), (0.7, 0.5), classes=10, beside=False),)


@dataclass
class Files:
    """The files of one network: where they are, and what is known of each before it is timed."""

    case: Case
    folder: Path
    table: LatencyTable
    paths: dict[str, Path] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def cut(self, **keys: Any) -> nn.Module:
        """The network, cut as ``keys`` of `prune` say; without any, dense."""
        model = self.case.built()
        if keys:
            prune.prune(model, self.case.example(), **keys)
        return model

    def add(self, label: str, model: nn.Module, bits: int = 8, asked: float | None = None) -> None:
        """Write ``model`` as ``label``: 32 bits for float, else quantized."""
        x = self.case.example()
        costs, dense = prune.CostModel(model, x), prune.CostModel(self.case.built(), x)
        estimate = self.table(costs.dense) if bits == 8 else None
        self.rows[label] = {
            "asked": asked,
            "estimate": estimate and estimate / self.table(self.table.dense),
            "table ms": estimate,
            "MACs": costs.macs(costs.dense) / dense.macs(dense.dense),
        }
        if bits < 32:
            quant.quantize(model, bits, bits, example_input=x)
            quant.calibrate(model, [x])
        path = self.folder / f"{len(self.paths)}.onnx"
        self.paths[label] = export(model.eval(), x, path, "packed" if bits < 32 else "float32").path


def written(case: Case, folder: Path, threads: int) -> Files:
    """The table, and every file of one network."""
    table = LatencyTable(case.built(), case.example(), folder / "table.json", threads)
    files = Files(case, folder, table)
    files.add("dense, fp32", files.cut(), 32)
    files.add("dense, int8", files.cut())
    for share in case.budgets:
        files.add(f"latency {share:g}", files.cut(budget=prune.Budget("cost", share, table)), asked=share)
    if case.beside:
        middle = case.budgets[len(case.budgets) // 2]
        files.add(f"latency {middle:g}, W4A4", files.cut(budget=prune.Budget("cost", middle, table)), 4)
        for label, keys in HALVES.items():
            files.add(f"{label}, fp32", files.cut(**keys), 32)
            files.add(f"{label}, int8", files.cut(**keys))
    return files


def timed(files: Files, threads: int, rounds: int) -> list[dict[str, Any]]:
    """A row per file, from one interleaved run."""
    clock = time.process_time if threads == 1 else time.perf_counter
    found = latency.measure(files.paths, threads=threads, runs=rounds, clock=clock)
    dense, floats = (found[f"dense, {form}"]["median_ms"] for form in ("int8", "fp32"))
    rows = []
    for label, known in files.rows.items():
        ms = found[label]["median_ms"]
        row = {"model": files.case.name, "file": label, **known, "measured": ms / dense, "ms": ms}
        rows.append({**row, "p90": found[label]["p90_ms"], "x fp32": floats / ms})
    return rows


def missed(row: dict[str, Any]) -> list[str]:
    """The targets that a row misses."""
    where, found = f"{row['model']}, {row['file']}", []
    if row["asked"] is not None:
        for one, two in itertools.combinations(("asked", "estimate", "measured"), 2):
            off = row[two] / row[one] - 1
            if abs(off) > WITHIN:
                found.append(f"target 1: {where}: {two} {row[two]:.3f} is {off:+.1%} of {one} {row[one]:.3f}")
    least = FASTER.get(row["file"], 0.0) if row["model"] == "resnet18" else 0.0
    if row["x fp32"] < least:
        found.append(f"target 2: {where}: {row['x fp32']:.2f} times as fast as dense fp32, wanted {least:g}")
    return found


def most(path: Path) -> float:
    """How many times as fast a float file can be without half of its MACs (see above)."""
    times, macs = defaultdict(list), {}
    for event in kernel_time.kernel_events(path):
        details, name = event["args"], event["name"]
        times[name].append(event["dur"])
        if details["op_name"] == "Conv":
            (weight,), (output,) = details["input_type_shape"][1].values(), details["output_type_shape"][0].values()
            macs[name] = math.prod(output) * math.prod(weight[1:])
    took = {name: statistics.median(seen[kernel_time.WARM_UP :]) for name, seen in times.items()}
    kept, room = 0.0, 0.5 * sum(macs.values())
    for name in sorted(macs, key=lambda name: took[name] / macs[name]):  # the fastest MACs stay
        share = min(1.0, room / macs[name])
        kept, room = kept + share * took[name], room - share * macs[name]
    return sum(took.values()) / kept


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(__doc__, argv)
    rows: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    gains: dict[str, float] = {}
    for case in QUICK if options.quick else FULL:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            files = written(case, Path(folder), options.threads)
            rows += timed(files, options.threads, 21 if options.quick else 51)
            gains[case.name] = round(most(files.paths["dense, fp32"]), 2)
            seconds[case.name] = round(time.perf_counter() - start, 1)
    failures = [failure for row in rows for failure in missed(row)]
    print(f"half of the MACs can be worth at most, in float: {gains}", file=sys.stderr)
    more = {"onnxruntime": ort.__version__, "seconds": seconds, "most": gains}
    return finish("latency_budget", rows, failures, options, **more)


if __name__ == "__main__":
    sys.exit(main())
