"""Every flat method against the plain optimizer at equal passes, on scikit-learn's handwritten digits, three seeds.

    python -m benchmarks.seed_methods [--quick] [--check]

A small convolutional network is trained on 500 of the 1,797 digits, the others test it. Every method takes the same
number of steps with its own defaults; *passes* is the work of a step, a forward and backward pass over the batch
counting 1 and a forward alone a third, and over a share of the batch that share of it. *plain* is the base optimizer
(SGD with momentum, one cycle) for as many steps as make up the same work. Cells that are done are kept in
benchmarks/results/seed_methods.partial, so a run that was stopped goes on.

Targets (``--check`` exits 1 where one is missed): SAM above plain; a method of at most 1.3 passes within one point of
SAM at as many steps.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks import _common
from flatcompress import flat

NAME = "seed_methods"
# Their setting is another: a posterior's own update, adapters, several losses.
LEFT_OUT = ("none", "bsam", "ggpo", "fmtl")
TRAIN, BATCH, STEPS = 500, 50, 300
CHEAP = 1.3


def network(wide: int = 1) -> nn.Module:
    """Two convolutions with BatchNorm and a linear layer, ``wide`` times as wide."""
    a, b = 12 * wide, 24 * wide
    return nn.Sequential(
        nn.Conv2d(1, a, 3, padding=1), nn.BatchNorm2d(a), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(b, 10),
    )  # fmt: skip


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, y) to train on and to test with, split by the seed."""
    raw = load_digits()
    x, y = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16, torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order[:TRAIN]], y[order[:TRAIN]], x[order[TRAIN:]], y[order[TRAIN:]]


def trained(method: str, steps: int, seed: int) -> dict[str, float]:
    """Test accuracy in percent and the passes of a step."""
    x, y, test_x, test_y = digits(seed)
    torch.manual_seed(seed)
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    optimizer = flat.create(method, model, base, seed=seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(base, 0.1, total_steps=steps)
    rng, work = torch.Generator().manual_seed(seed), [0.0]
    for _ in range(steps):
        rows = torch.randint(0, len(x), (BATCH,), generator=rng)
        optimizer.step(closure_of(model, x[rows], y[rows], optimizer.method.selects, work))
        schedule.step()
    model.eval()
    with torch.no_grad():
        right = float((model(test_x).argmax(1) == test_y).double().mean())
    return {"accuracy": 100 * right, "passes": work[0] / steps / BATCH}


def closure_of(model: nn.Module, x: Tensor, y: Tensor, selects: bool, work: list[float]) -> Callable[..., Tensor]:
    """A closure that counts the samples it works through."""

    def chosen(keep: Tensor | None = None) -> Tensor:
        part, target = (x, y) if keep is None else (x[keep], y[keep])
        losses = nn.functional.cross_entropy(model(part), target, reduction="none")
        work[0] += len(target) * (1.0 if torch.is_grad_enabled() else 1 / 3)
        if torch.is_grad_enabled():
            losses.mean().backward()
        return losses if selects else losses.mean()

    def whole() -> Tensor:
        return chosen()

    return chosen if selects else whole


def cells(names: Sequence[str], seeds: Sequence[int], steps: int, store: _common.Kept) -> list[dict[str, Any]]:
    """Every method's row, and plain's at the same work; what is in ``store`` already is not run again."""

    def cell(method: str, count: int, seed: int) -> dict[str, float]:
        return store.get(f"{method}/{count}/{seed}", lambda: trained(method, count, seed))

    rows = []
    for name in names:
        own = [cell(name, steps, seed) for seed in seeds]
        passes = statistics.mean(c["passes"] for c in own)
        plain = [cell("none", round(steps * passes), seed) for seed in seeds]
        gains = [a["accuracy"] - b["accuracy"] for a, b in zip(own, plain)]
        rows.append({
            "method": name, "passes": round(passes, 2), "accuracy": _mean(own), "plain": _mean(plain),
            "gain": round(statistics.mean(gains), 2),
            "standard error": round(statistics.stdev(gains) / len(gains) ** 0.5, 2) if len(gains) > 1 else None,
        })  # fmt: skip
    return rows


def _mean(found: Sequence[dict[str, float]]) -> float:
    return round(statistics.mean(c["accuracy"] for c in found), 2)


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The targets that are not met, as sentences."""
    sam = next(row for row in rows if row["method"] == "sam")
    cheap = [row for row in rows if row["passes"] <= CHEAP]
    found = [] if sam["gain"] > 0 else [f"SAM gains {sam['gain']:.2f} points over plain at equal passes"]
    if not any(row["accuracy"] >= sam["accuracy"] - 1.0 for row in cheap):
        found.append(f"no method of at most {CHEAP} passes is within one point of SAM's {sam['accuracy']:.2f}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not there yet, print, write; the exit code."""
    options = _common.arguments(__doc__, argv, _common.resumable)
    names = ["sam", "ksam", "vsam"] if options.quick else [n for n in flat.METHODS if n not in LEFT_OUT]
    seeds, steps = ((0,), 60) if options.quick else ((0, 1, 2), STEPS)
    rows = cells(names, seeds, steps, _common.kept(NAME, options))
    return _common.finish(NAME, rows, missed(rows), options)


if __name__ == "__main__":
    sys.exit(main())
