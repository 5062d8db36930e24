"""Step time and peak memory of every flat-minima method, against hand-written passes and a peer.

    python -m benchmarks.flat_step [--quick] [--check]

Models: ResNet-20 (batch 32) and vit_tiny (batch 32) on 3 x 32 x 32 inputs, SGD with momentum. All contenders alternate
within a round; ``vs_hand`` is the median over rounds of the time over that of as many hand-written passes: two for
two-pass methods, one plain step for one-pass ones. ``peak_mb`` counts live tensors of one step beside the model.

Targets
  1. SAM: at most 1.05 of two hand-written passes.
  2. SAM: not slower than pytorch_optimizer's SAM (measured when that package is installed; 2 % is the noise).
  3. One-pass methods: at most 1.1 of a plain step.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._common import PeakMemory, arguments, finish, interleaved, ratio
from flatcompress import flat, models

PEER = "pytorch_optimizer SAM"
CLOSE = ("plain step", "two passes by hand", PEER, "sam")
ONE_PASS = ("none", "msam", "dpsat", "lpf_sgd", "ggpo")
PASSES = {"gam": 4}
SETTINGS = {"resnet20": 32, "vit_tiny": 32}
OPTIONS: dict[str, dict[str, Any]] = {"looksam": {"k": 1}}  # every step a double one; k = 5 costs 1.2 plain steps


class Contender:
    """A model of its own, one batch and a step to time."""

    def __init__(self, kind: str, batch: int) -> None:
        self.model = models.build(kind, num_classes=10, input_shape=(3, 32, 32), seed=0).train()
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(batch, 3, 32, 32, generator=g)
        self.y = torch.randint(0, 10, (batch,), generator=g)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.base = torch.optim.SGD(self.params, lr=1e-3, momentum=0.9)

    def closure(self) -> Tensor:
        """Forward and backward."""
        loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        return loss


def plain(c: Contender) -> Callable[[], Any]:
    """One pass by hand."""

    def step() -> None:
        c.base.zero_grad()
        c.closure()
        c.base.step()

    return step


def hand(c: Contender) -> Callable[[], Any]:
    """SAM by hand, as little as it can be: two passes, multi-tensor arithmetic, restore by copy."""
    saved = [torch.empty_like(p) for p in c.params]

    def step() -> None:
        c.base.zero_grad()
        c.closure()
        with torch.no_grad():
            grads = [p.grad for p in c.params]
            size = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            torch._foreach_copy_(saved, c.params)
            torch._foreach_add_(c.params, torch._foreach_mul(grads, 0.05 / (size + 1e-12)))
        c.base.zero_grad()
        c.closure()
        with torch.no_grad():
            torch._foreach_copy_(c.params, saved)
        c.base.step()

    return step


def ours(name: str, c: Contender) -> Callable[[], Any]:
    """The method through the engine."""
    optimizer = flat.create(name, c.model, c.base, **OPTIONS.get(name, {}))
    return lambda: optimizer.step(c.closure)


def peer(c: Contender) -> Callable[[], Any] | None:
    """pytorch_optimizer's SAM, where it is installed."""
    try:
        from pytorch_optimizer import SAM
    except ImportError:
        return None
    optimizer = SAM(c.params, torch.optim.SGD, rho=0.05, lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        c.closure()
        optimizer.first_step(zero_grad=True)
        c.closure()
        optimizer.second_step(zero_grad=True)

    return step


def contenders(kind: str, batch: int) -> dict[str, Callable[[], Any]]:
    """Everything that is timed on one model, by name."""
    found: dict[str, Callable[[], Any] | None] = {
        "plain step": plain(Contender(kind, batch)),
        "two passes by hand": hand(Contender(kind, batch)),
        PEER: peer(Contender(kind, batch)),
    }
    found.update({name: ours(name, Contender(kind, batch)) for name in flat.METHODS})
    return {name: step for name, step in found.items() if step is not None}


def peak_megabytes(step: Callable[[], Any]) -> float:
    """Largest sum of live tensors that one step makes, after a first one has made its lasting state."""
    step()
    with PeakMemory() as memory:
        step()
    return memory.peak / 2**20


def measure(kind: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    """One row per contender."""
    tasks = contenders(kind, batch)
    every = interleaved(tasks, rounds, warmup=2)
    # The narrow targets are about these: by themselves, over more rounds, with less in one another's caches.
    close = interleaved({name: tasks[name] for name in CLOSE if name in tasks}, 2 * rounds)
    rows = []
    for name, step in tasks.items():
        times = close if name in close else every
        by_hand = "plain step" if name in (*ONE_PASS, "plain step") else "two passes by hand"
        versus_peer = name == "sam" and PEER in times
        rows.append(
            {
                "model": kind,
                "contender": name,
                "passes": PASSES.get(name, 1 if by_hand == "plain step" else 2),
                "ms": 1e3 * statistics.median(times[name]),
                "vs_hand": ratio(times[name], times[by_hand]),
                "vs_plain": ratio(times[name], times["plain step"]),
                "vs_peer": ratio(times[name], times[PEER]) if versus_peer else None,
                "peak_mb": peak_megabytes(step),
            }
        )
    return rows


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The targets that the rows miss, as sentences."""
    found = []
    for row in rows:
        where = f"{row['contender']} on {row['model']}"
        if row["contender"] == "sam" and row["vs_hand"] > 1.05:
            found.append(f"{where} takes {row['vs_hand']:.3f} of two hand-written passes, target 1.05")
        if row["vs_peer"] is not None and row["vs_peer"] > 1.02:
            found.append(f"{where} takes {row['vs_peer']:.3f} of pytorch_optimizer's SAM, target 1")
        if row["contender"] in ONE_PASS and row["vs_plain"] > 1.1:
            found.append(f"{where} takes {row['vs_plain']:.3f} of a plain step, target 1.1")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    options = arguments(__doc__, argv)
    rounds = 3 if options.quick else 15
    rows = [row for kind, batch in SETTINGS.items() for row in measure(kind, batch, rounds)]
    return finish("flat_step", rows, missed(rows), options, rounds=rounds)


if __name__ == "__main__":
    sys.exit(main())
