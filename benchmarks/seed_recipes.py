"""Methods that are recipes or functions, each against its plain counterpart at equal passes, three seeds.

    python -m benchmarks.seed_recipes [--quick] [--check]

*forecast*: SAMformer's network (arXiv 2402.10198) on the synthesised loads, by Adam, and by SAM for half the steps;
*quality* is R2 on the test part in percent, *more* has it for the other network of sites.

*iso-FLOP*: a small convolutional network on 600 handwritten digits, as it is, with Sparse-IFT's doped layers (arXiv
2303.11525), folded, and twice as wide under masks of as many weights; *quality* is accuracy in percent.

*unseen domain*: the same network on the rotated digits, one rotation held out; *quality* is accuracy there in percent,
*more* has it for the rotations that were seen. SAM, and UDIM (arXiv 2403.07329), whose step counts as eight passes,
after a quarter of them by SAM.

*passes* are forward and backward passes; the rows of a setting have as many. *against* is the row that a gain is over.
Cells that are done are kept in benchmarks/results/seed_recipes.partial. No target is set: what gains nothing says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import _common
from benchmarks.seed_methods import BATCH, network
from benchmarks.seed_settings import OPTIMIZER, begin, compared
from flatcompress import data, prune
from flatcompress.flat.inconsistency import Udim
from flatcompress.models.series_nets import samformer
from flatcompress.plan import Plan
from flatcompress.prune import isoflop
from flatcompress.stages import RunContext, run_stage, stage_of
from flatcompress.training.batches import evaluate
from flatcompress.training.devices import seed_everything
from flatcompress.training.loop import make_accelerator

NAME = "seed_recipes"
Found = dict[str, float]
# setting -> row -> (what is different, the row it is compared with)
ROWS: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "forecast": {
        "adam": ({"method": "none"}, ""),
        "sam, rho 0.05": ({"method": "sam", "rho": 0.05}, "adam"),
        "sam, rho 0.3": ({"method": "sam", "rho": 0.3}, "adam"),
        "sam, rho 0.7": ({"method": "sam", "rho": 0.7}, "adam"),
    },
    "iso-FLOP": {
        "dense": ({}, ""),
        "sparse_doped 0.5": ({"form": "sparse_doped", "sparsity": 0.5}, "dense"),
        "sparse_doped 0.75": ({"form": "sparse_doped", "sparsity": 0.75}, "dense"),
        "sparse_wide 0.75": ({"form": "sparse_wide", "sparsity": 0.75}, "dense"),
    },
    "unseen domain": {
        "sam": ({"lam": 0.0}, ""),
        "udim, move 0.005": ({"lam": 0.5, "move": 0.005}, "sam"),
        "udim, move 0.1": ({"lam": 0.5, "move": 0.1}, "sam"),
    },
}


def stage(kind: str, run: RunContext, **keys: Any) -> RunContext:
    """``run`` after a stage that keeps its last epoch."""
    return run_stage(kind, run, stage_of(kind).config.model_validate({"select": "last", **keys}))


def forecast(keys: dict[str, Any], seed: int, scale: float) -> Found:
    """R2 in percent of a SAMformer on the loads."""
    seed_everything(seed)
    bundle = data.load("drawn-loads", seed=seed, corruptions="none", task={"name": "regression", "select": "rmse"})
    build = partial(samformer, 96, bundle.input_shape)
    run = RunContext(build(), Plan(), bundle, build, make_accelerator("cpu"), batch_size=64, seed=seed)
    epochs = round(scale * (40 if keys["method"] == "none" else 20))
    run = stage("train", run, epochs=epochs, optimizer={"name": "adam", "lr": 1e-3, "weight_decay": 1e-5}, **keys)
    score, other = (100 * evaluate(run.model, part, bundle.task)["r2"] for part in (bundle.test, bundle.held_out))
    return {"quality": score, "passes": float(run.passes), "held out": other}


def iso_flop(keys: dict[str, Any], seed: int, scale: float) -> Found:
    """Accuracy in percent of the digits' network, its weights trained in the form that ``keys`` name."""
    seed_everything(seed)
    wide = isoflop.wider(1, keys["sparsity"]) if keys.get("form") == "sparse_wide" else 1
    model = network(wide)
    run = begin("iso-FLOP", seed, model)
    if keys:
        prune.REPARAMETRIZATIONS[keys["form"]](model, keys["sparsity"], seed)
    run = stage("train", run, method="none", epochs=round(scale * 16), optimizer=OPTIMIZER)
    run.model = isoflop.fold(run.model)
    params = sum(int(p.count_nonzero()) for p in run.model.parameters())
    accuracy = evaluate(run.model, run.data.test, run.data.task)["accuracy"]
    return {"quality": 100 * accuracy, "passes": float(run.passes), "non-zero": float(params)}


def unseen(keys: dict[str, Any], seed: int, scale: float) -> Found:
    """Accuracy in percent on a rotation that was never seen, of the digits' network by SAM or UDIM."""
    seed_everything(seed)
    bundle = data.load("rotated-digits", seed=seed, size=8, held_out="75", corruptions="none")
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    udim = Udim(model, base, model[-1], **{**keys, "lam": 0.0})
    passes, first = round(scale * 1600), round(scale * 400)
    steps = passes // 2 if not keys["lam"] else first // 2 + (passes - first) // 8
    schedule = torch.optim.lr_scheduler.OneCycleLR(base, 0.1, total_steps=steps)
    rng = torch.Generator().manual_seed(seed)
    for step in range(steps):
        udim.lam = keys["lam"] if step >= first // 2 else 0.0
        rows = torch.randint(0, len(bundle.train), (BATCH,), generator=rng).tolist()
        udim.step(*bundle.train.__getitems__(rows))
        schedule.step()
    score, seen = (100 * evaluate(model, part, bundle.task)["accuracy"] for part in (bundle.held_out, bundle.test))
    return {"quality": score, "passes": float(passes), "seen": seen}


MEASURED: dict[str, Callable[[dict[str, Any], int, float], Found]] = {
    "forecast": forecast,
    "iso-FLOP": iso_flop,
    "unseen domain": unseen,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not there yet, print, write; the exit code."""
    options = _common.arguments(__doc__, argv, _common.resumable)
    seeds, scale = ((0,), 0.2) if options.quick else ((0, 1, 2), 1.0)
    store = _common.kept(NAME, options)
    rows = [
        row for setting, named in ROWS.items()
        for row in compared(setting, named, MEASURED[setting], seeds, scale, store, "quality", digits=4)
    ]  # fmt: skip
    return _common.finish(NAME, rows, [], options)


if __name__ == "__main__":
    sys.exit(main())
