"""A training step with channels last against one as it is, LSQ against float, and SAM against another checkout.

    python -m benchmarks.memory_format [--quick] [--check] [--threads 1] [--against CHECKOUT]

MobileNetV2, EfficientNet-Lite0 (without its published weights) and ResNet-20, batch 32, SGD with momentum, W4A4. The
allocator keeps what it frees, as in ``flatcompress run``. All contenders of a network alternate; a ratio is the median
over rounds of the time over that of the reference in the same round. ``lsq`` is over the float step in the layout that
``memory_format: auto`` chooses. ``--against``: a folder with another commit's source; each side takes SAM's steps in a
process of its own, in turns, and ``sam`` is how often this one's fits into the other's.

Targets
  1. channels last: MobileNetV2 at least 1.2, EfficientNet-Lite0 at least 1.4 times as fast.
  2. LSQ: at most 1.4 of the float step on both.
  3. with ``--against`` commit 4004874: SAM at least 1.4 times as fast on MobileNetV2, 2 times on EfficientNet-Lite0.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import _against
from benchmarks._common import arguments, finish, interleaved, ratio
from benchmarks._lite0 import Lite0
from flatcompress import models, quant
from flatcompress.environment import keep_freed_memory
from flatcompress.training import layout

BATCH, CLASSES = 32, 10
LEARNING_RATE = (
    1e-15  # at 1e-6 the scales of these untrained networks went to -1e9: what was timed was the guard's path
)
NETWORKS = {"mobilenet_v2": 96, "efficientnet_lite0": 96, "resnet20": 32}  # pixels of a side
LEAST = {"mobilenet_v2": (1.2, 1.4), "efficientnet_lite0": (1.4, 2.0)}  # of channels last, of SAM against the other

# What a side of --against runs: it must do with what older commits have.
SIDE = """
import importlib.util, inspect, sys, time, torch
from flatcompress import flat, models
name, side, lite0, last, threads = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "True", int(sys.argv[5])
torch.set_num_threads(threads)
try:
    from flatcompress.environment import keep_freed_memory
    keep_freed_memory()
except ImportError:
    pass
torch.manual_seed(0)
if name == "efficientnet_lite0":
    spec = importlib.util.spec_from_file_location("lite0", lite0)
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    model = module.Lite0(10)
else:
    model = models.build(name, num_classes=10, input_shape=(3, side, side), seed=0)
x, y = torch.randn(32, 3, side, side), torch.randint(0, 10, (32,))
if last:
    model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
model.train()
step = flat.create("sam", model, torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9), rho=0.05)
def closure():
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss
for line in sys.stdin:
    begun = time.process_time()
    step.zero_grad(); step.step(closure)
    print(time.process_time() - begun, flush=True)
"""


def network(name: str) -> nn.Module:
    """The network ``name``, the same weights every time."""
    torch.manual_seed(0)
    if name == "efficientnet_lite0":
        return Lite0(CLASSES)
    side = NETWORKS[name]
    return models.build(name, num_classes=CLASSES, input_shape=(3, side, side), seed=0)


def step_of(name: str, form: str, quantized: bool, compiled: bool = False) -> Callable[[], Any]:
    """A training step of ``name``, float or W4A4, whose tensors lie as ``form`` says; ``compiled`` as one graph."""
    model, side = network(name), NETWORKS[name]
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(BATCH, 3, side, side, generator=g), torch.randint(0, CLASSES, (BATCH,), generator=g)
    if quantized:
        quant.quantize(model, 4, 4, example_input=x[:2])
        quant.calibrate(model, [x])
    layout.put(model, form)
    x = layout.laid(x, form)
    model.train()
    if compiled:
        model.compile(fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def row_of(name: str, rounds: int, against: Path | None, threads: int) -> dict[str, Any]:
    """What was measured of one network."""
    auto = layout.chosen("auto", network(name), (3, NETWORKS[name], NETWORKS[name]), torch.device("cpu"))
    tasks = {form: step_of(name, form, False) for form in layout.FORMATS}
    times = interleaved({**tasks, "lsq": step_of(name, auto, True)}, rounds)
    row: dict[str, Any] = {
        "network": name,
        "auto": auto,
        "contiguous_ms": 1e3 * statistics.median(times["contiguous"]),
        "channels_last_ms": 1e3 * statistics.median(times["channels_last"]),
        "gain": ratio(times["contiguous"], times["channels_last"]),
        "lsq": ratio(times["lsq"], times[auto]),
    }
    return row if against is None else {**row, "sam": _sam(name, rounds, against, auto, threads)}


def _sam(name: str, rounds: int, checkout: Path, auto: str, threads: int) -> float:
    """How often this checkout's SAM step fits into the other's, both as their defaults lay tensors out."""
    given = [[name, str(NETWORKS[name]), str(Path(__file__).parent / "_lite0.py"), str(last), str(threads)]
             for last in (auto == "channels_last", False)]  # fmt: skip
    here, there = _against.seconds(SIDE, checkout, rounds, threads, *given)
    return ratio(there, here)


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The targets that the rows miss, as sentences."""
    found = []
    for row in rows:
        if row["network"] not in LEAST:
            continue
        gain, sam = LEAST[row["network"]]
        if row["gain"] < gain:
            found.append(f"{row['network']}: channels last is {row['gain']:.2f} times as fast, target {gain}")
        if row["lsq"] > 1.4:
            found.append(f"{row['network']}: LSQ takes {row['lsq']:.2f} of the float step, target 1.4")
        if row.get("sam", sam) < sam:
            found.append(f"{row['network']}: SAM is {row['sam']:.2f} times as fast as there, target {sam}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    options = arguments(__doc__, argv, _against.option)
    keep_freed_memory()
    rounds = 3 if options.quick else 9
    rows = [row_of(name, rounds, options.against, options.threads) for name in NETWORKS]
    return finish("memory_format", rows, missed(rows), options, rounds=rounds, batch=BATCH)


if __name__ == "__main__":
    sys.exit(main())
