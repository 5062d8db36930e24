"""Step time and peak memory of quantization-aware training on ResNet-20, W4A4, batch 64 on 3 x 32 x 32.

    python -m benchmarks.qat_step [--quick] [--check] [--threads 2]

All contenders alternate within a round, SGD with momentum; a ratio is the median over rounds of the time over that of
the reference in the same round. ``peak_mb`` counts live tensors of one step beside the model. Brevitas's stock
learned quantizer is measured after it has stopped collecting statistics (30 steps), where its step is cheapest.

Targets
  1. LSQ on Brevitas layers: at most 1.5 of the float step.
  2. LSQ: at most 0.85 of Brevitas's stock learned quantizer.
  3. GAQAT (SAGM's two passes and the conflict rule): at most 2.1 of the LSQ step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._common import PeakMemory, arguments, finish, interleaved, ratio
from flatcompress import flat, models, quant

BATCH = 64
STATISTICS_STEPS = 31  # of Brevitas's stock activation quantizers


class Contender:
    """A ResNet-20 of its own, quantized by ``method`` (None: float), with one batch and one optimizer."""

    def __init__(self, method: str | None) -> None:
        self.model = models.build("resnet20", num_classes=10, input_shape=(3, 32, 32), seed=0)
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(BATCH, 3, 32, 32, generator=g)
        self.y = torch.randint(0, 10, (BATCH,), generator=g)
        if method is not None:
            quant.quantize(self.model, 4, 4, method=method)
            quant.calibrate(self.model, [self.x])
        self.model.train()
        # Slow enough that no scale comes near zero in the rounds to come: the guard's path is not what is timed.
        self.base = torch.optim.SGD(self.model.parameters(), lr=1e-6, momentum=0.9)

    def closure(self) -> Tensor:
        """Forward and backward."""
        loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        return loss


def plain(c: Contender) -> Callable[[], Any]:
    """An ordinary training step."""

    def step() -> None:
        c.base.zero_grad()
        c.closure()
        c.base.step()

    return step


def two_pass(c: Contender, watch: bool) -> Callable[[], Any]:
    """SAGM's step on the quantized model, scales unperturbed; with GAQAT's rule when ``watch``."""
    scales = {id(p) for p in quant.scale_parameters(c.model).values()}
    compose = quant.ScaleConflict(c.model, K=4, tau=0.5).compose if watch else None
    optimizer = flat.create("sagm", c.model, c.base, compose=compose, perturbed=lambda _, p: id(p) not in scales)
    return lambda: optimizer.step(c.closure)


def contenders() -> dict[str, Callable[[], Any]]:
    """Everything that is timed, by name."""
    stock = plain(Contender("brevitas"))
    for _ in range(STATISTICS_STEPS):
        stock()
    return {
        "float": plain(Contender(None)),
        "lsq": plain(Contender("lsq")),
        "lsq+": plain(Contender("lsq+")),
        "pact": plain(Contender("pact")),
        "brevitas": stock,
        "lsq+sagm": two_pass(Contender("lsq"), watch=False),
        "gaqat": two_pass(Contender("lsq"), watch=True),
    }


def peak_megabytes(step: Callable[[], Any]) -> float:
    """Largest sum of live tensors that one step makes, after a first one has made its lasting state."""
    step()
    with PeakMemory() as memory:
        step()
    return memory.peak / 2**20


def measure(rounds: int) -> list[dict[str, Any]]:
    """One row per contender."""
    tasks = contenders()
    times = interleaved(tasks, rounds, warmup=2)
    return [
        {
            "contender": name,
            "ms": 1e3 * sorted(times[name])[rounds // 2],
            "vs_float": ratio(times[name], times["float"]),
            "vs_lsq": ratio(times[name], times["lsq"]),
            "vs_brevitas": ratio(times[name], times["brevitas"]),
            "peak_mb": peak_megabytes(step),
        }
        for name, step in tasks.items()
    ]


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The targets that the rows miss, as sentences."""
    by_name = {row["contender"]: row for row in rows}
    targets = (("lsq", "vs_float", 1.5), ("lsq", "vs_brevitas", 0.85), ("gaqat", "vs_lsq", 2.1))
    return [
        f"{name} takes {by_name[name][column]:.3f} ({column}), target {most}"
        for name, column, most in targets
        if by_name[name][column] > most
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    options = arguments(__doc__, argv)
    rounds = 3 if options.quick else 15
    rows = measure(rounds)
    return finish("qat_step", rows, missed(rows), options, rounds=rounds, batch=BATCH)


if __name__ == "__main__":
    sys.exit(main())
