"""Two processes against one: are the weights the same on every rank, and those of one process with the whole batch?

    python -m benchmarks.processes [--quick] [--check] [--launcher torchrun | accelerate]

Every stage that trains, by its default method and others, on two gloo processes of batch 32 and on one of batch 64, at
the same seed: ``ranks_differ`` is the largest difference between the ranks' weights and scales, ``one_process`` the
largest distance from the one process, as a share of the largest weight of a tensor. The network has no BatchNorm: its
statistics are each process's own batch's, so with it two processes are another (as sound) training than one; the row
``batchnorm`` shows by how much. ``per_replica`` is the flat methods' default: each process climbs by its own half of
the batch (m-sharpness with m = 32), so one process with the whole batch is something else; ``synced`` is the same.
Rows that begin with ``fsdp`` divide weights, gradients and moments over the processes (``strategy: fsdp``). The last
rows say what SAM on AdamW takes of a process's memory for 34 M parameters in eight blocks, above what it had with the
network built: the peak of three steps.

Targets
  1. every row: the ranks hold the same bits.
  2. every row but ``per_replica`` and ``batchnorm``: at most 1 % from the one process.
  3. divided over two processes: at most 0.7 of the memory that it takes where both have all.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks._common import arguments, finish
from flatcompress import Pipeline, data, flat
from flatcompress.training import fsdp, memory

BATCH, RANKS = 32, 2
PORT = 29671
TRAIN = {"epochs": 1, "select": "last", "schedule": "constant", "optimizer": {"name": "sgd", "lr": 0.02}}
FIRST: dict[str, Any] = {"train": {**TRAIN, "method": "none"}}
SYNCED = {"perturb": "synced"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "train none": [FIRST],
    "train sam, synced": [{"train": {**TRAIN, "method": "sam", **SYNCED}}],
    "train sagm, synced": [{"train": {**TRAIN, "method": "sagm", **SYNCED}}],
    "train sam, per_replica": [{"train": {**TRAIN, "method": "sam"}}],
    "train ema": [{"train": {**TRAIN, "method": "none", "averaging": "ema"}}],
    "prune adasap, synced": [FIRST, {"prune": {**TRAIN, "ratio": 0.5, **SYNCED}}],
    "prune taylor": [FIRST, {"prune": {**TRAIN, "method": "taylor", "ratio": 0.5, "flat": "none"}}],
    "sparsify, synced": [FIRST, {"sparsify": {**TRAIN, "sparsity": 0.6, **SYNCED}}],
    "quantize lsq": [FIRST, {"quantize": {**TRAIN, "method": "lsq", "optimizer": {"name": "sgd", "lr": 1e-3}}}],
    "quantize gaqat, synced": [
        FIRST,
        {"quantize": {**TRAIN, "method": "gaqat", "K": 5, **SYNCED, "optimizer": {"name": "sgd", "lr": 1e-3}}},
    ],
    "train none, batchnorm": [FIRST],
    "fsdp: train none": [FIRST],
    "fsdp: train sam": [{"train": {**TRAIN, "method": "sam", **SYNCED}}],
    "fsdp: train sagm": [{"train": {**TRAIN, "method": "sagm", **SYNCED}}],
    "fsdp: train ema": [{"train": {**TRAIN, "method": "none", "averaging": "ema"}}],
    "fsdp: quantize lsq": [FIRST, {"quantize": {**TRAIN, "method": "lsq", "optimizer": {"name": "sgd", "lr": 1e-3}}}],
    "fsdp: quantize gaqat": [
        FIRST,
        {"quantize": {**TRAIN, "method": "gaqat", "K": 5, **SYNCED, "optimizer": {"name": "sgd", "lr": 1e-3}}},
    ],
}
APART = ("per_replica", "batchnorm")
MOST, SHARE = 0.01, 0.7
MEMORY = ("memory: ddp, sam on adamw", "memory: fsdp, sam on adamw")
WIDE, BLOCKS = 2048, 8


class Net(nn.Module):
    """[B, 1, 8, 8] -> logits [B, 10]: two convolutions, a shortcut, with BatchNorm or without."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16) if norm else nn.Identity()
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(2), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv1(x)))
        return self.fc(self.pool(self.relu(self.conv2(x) + x)).flatten(1))


def trained(name: str, batch: int, folder: Path) -> dict[str, Tensor]:
    """The weights and scales after the stages of row ``name``, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bundle = data.load("rotated-digits", domains=["0"], size=8, corruptions="none")
    options = {"batch_size": batch, "device": "cpu", "measure": "off", "memory_format": "contiguous"}
    options["strategy"] = "fsdp" if name.startswith("fsdp") else "ddp"
    pipeline = Pipeline(model=Net("batchnorm" in name), data=bundle, stages=ROWS[name], **options)
    model = pipeline.run(folder, restart=True).model
    return {key: value.detach().clone() for key, value in model.state_dict().items() if value.is_floating_point()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference, as a share of each tensor's largest value; infinite where shapes differ."""
    if [(k, v.shape) for k, v in one.items()] != [(k, v.shape) for k, v in other.items()]:
        return float("inf")
    rows = [float((one[k] - other[k]).abs().max() / one[k].abs().max().clamp_min(1e-12)) for k in one if one[k].numel()]
    return max(rows)


def on_two(name: str, launcher: str, port: int) -> list[Any]:
    """What each of two processes ends with."""
    start = {
        "torchrun": ["torch.distributed.run", "--nproc_per_node", str(RANKS), "--master_port", str(port)],
        "accelerate": [
            # With --cpu accelerate starts one process: it knows several on a CPU through mpirun alone.
            "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(RANKS), "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port),
        ],
    }[launcher]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", *start, "-m", "benchmarks.processes", "--worker", name, "--into", folder]
        # What is freed goes back at once: else glibc's share of every thread that sends messages counts as held.
        given = {"OMP_NUM_THREADS": "1"} | ({"MALLOC_MMAP_THRESHOLD_": "1000000"} if name in MEMORY else {})
        done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def row_of(name: str, launcher: str, port: int) -> dict[str, Any]:
    """One row of the table."""
    ranks = on_two(name, launcher, port)
    with tempfile.TemporaryDirectory() as folder:
        alone = trained(name, RANKS * BATCH, Path(folder))
    return {
        "stage": name,
        "tensors": len(alone),
        "ranks_differ": distance(*ranks),
        "one_process": distance(alone, ranks[0]),
    }


def stepped(strategy: str) -> int:
    """Bytes that three steps of SAM on AdamW take of this process, above what it has once the network is built."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(nn.Sequential(nn.Linear(WIDE, WIDE), nn.ReLU()) for _ in range(BLOCKS)))
    before = memory.peak_bytes(torch.device("cpu")) or 0
    if strategy == "fsdp":
        fsdp.divide(model)
    else:
        model = DistributedDataParallel(model)
    step = flat.create("sam", model, torch.optim.AdamW(model.parameters(), lr=1e-4), rho=0.05, perturb="synced")
    x = torch.randn(BATCH, WIDE)

    def closure() -> Tensor:
        loss = model(x).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for _ in range(3):
        step.step(closure)
    peak = memory.peak_bytes(torch.device("cpu")) or 0
    dist.destroy_process_group()
    return peak - before


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The targets that the rows miss, as sentences."""
    trained = [row for row in rows if "ranks_differ" in row]
    taken = {row["stage"]: row["megabytes"] for row in rows if "megabytes" in row}
    apart = [f"{row['stage']}: the ranks differ by {row['ranks_differ']:.2g}" for row in trained if row["ranks_differ"]]
    far = [
        f"{row['stage']}: {row['one_process']:.2g} from one process, target {MOST}"
        for row in trained
        if row["one_process"] > MOST and not any(word in row["stage"] for word in APART)
    ]
    share = taken[MEMORY[1]] / taken[MEMORY[0]] if taken else 0.0
    return [*apart, *far, *([f"{MEMORY[1]}: {share:.2f} of {MEMORY[0]}, target {SHARE}"] if share > SHARE else [])]


def _own(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--launcher", choices=("torchrun", "accelerate"), default="torchrun", help="who starts them")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    options = arguments(__doc__, argv, _own)
    if options.worker in MEMORY:
        torch.save(stepped(options.worker.split()[1].strip(",")), options.into / f"{os.environ['RANK']}.pt")
        return 0
    if options.worker:
        state = trained(options.worker, BATCH, options.into / "run")
        torch.save(state, options.into / f"{os.environ['RANK']}.pt")
        dist.destroy_process_group()
        return 0
    names = list(ROWS)[:2] if options.quick else list(ROWS)
    rows = [row_of(name, options.launcher, PORT + i) for i, name in enumerate(names)]
    for i, name in enumerate(() if options.quick else MEMORY):
        most = max(on_two(name, options.launcher, PORT + len(names) + i))
        rows.append({"stage": name, "megabytes": most / 1e6})
    name = "processes" if options.launcher == "torchrun" else f"processes-{options.launcher}"
    return finish(name, rows, missed(rows), options, launcher=options.launcher, batch=BATCH)


if __name__ == "__main__":
    sys.exit(main())
