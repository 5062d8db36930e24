"""Methods that change the data, the loss or the setting, each against its plain counterpart at equal passes, 3 seeds.

    python -m benchmarks.seed_settings [--quick] [--check]

*useful*: 500 handwritten digits (scikit-learn's); USEFUL's separating epochs count, so its second training is shorter.
*long tail*: the first digit has 50 times the samples of the last (arXiv 2212.13827's setting, made small); the test
part is not thinned. *passes* are forward and backward passes; every row of a setting has as many, a method of two
passes a step taking half the epochs. What a row is compared with stands in its column *against*. Cells that are done are
kept in benchmarks/results/seed_settings.partial.

Targets (``--check`` exits 1 where one is missed): on the long tail SAM with deferred weights above SGD without.
"""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import _common
from benchmarks.seed_methods import network
from flatcompress import data
from flatcompress.plan import Plan
from flatcompress.stages import RunContext, run_stage, stage_of
from flatcompress.training.batches import evaluate
from flatcompress.training.devices import seed_everything
from flatcompress.training.loop import make_accelerator

NAME = "seed_settings"
EPOCHS, BATCH = 40, 25  # of one pass a step
DRW = {"name": "drw", "beta": 0.99}
# setting -> row -> (keys of the train stage, the row it is compared with)
ROWS: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "useful": {
        "sgd": ({"method": "none"}, ""),
        "sgd, useful": ({"method": "none", "emphasis": "useful"}, "sgd"),
        "sam": ({"method": "sam"}, "sgd"),
        "sam, useful": ({"method": "sam", "emphasis": "useful"}, "sam"),
    },
    "long tail": {
        "sgd": ({"method": "none"}, ""),
        "sgd, drw": ({"method": "none", "emphasis": DRW}, "sgd"),
        "sam": ({"method": "sam"}, "sgd"),
        "sam, reweight": ({"method": "sam", "emphasis": {"name": "reweight", "beta": 0.99}}, "sam"),
        "sam, drw": ({"method": "sam", "emphasis": DRW}, "sgd"),
        "sam, drw, late_rho 0.2": ({"method": "sam", "emphasis": {**DRW, "late_rho": 0.2}}, "sam, drw"),
    },
}


def digits(setting: str, seed: int) -> data.DataBundle:
    """The digits of a setting, split by the seed."""
    tail = {"long_tail": 50} if setting == "long tail" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        share = 0.3 if tail else 0.62
        return data.load(
            "rotated-digits", seed=seed, domains=["0"], size=8, test_fraction=share, corruptions="none", **tail
        )  # fmt: skip


def trained(setting: str, keys: dict[str, Any], seed: int, epochs: int) -> dict[str, float]:
    """Test accuracy in percent and the passes of the whole stage; ``epochs`` of one pass a step."""
    seed_everything(seed)
    bundle = digits(setting, seed)
    run = RunContext(network(), Plan(), bundle, network, make_accelerator("cpu"), batch_size=BATCH, seed=seed)
    steps = run.steps_per_epoch * epochs // (1 if keys["method"] == "none" else 2)
    if keys.get("emphasis") == "useful":
        steps -= run.steps_per_epoch * max(1, round(0.08 * epochs))
    optimizer = {"name": "sgd", "lr": 0.1, "weight_decay": 5e-4, "nesterov": False}
    whole = {"epochs": epochs, "max_steps": steps, "optimizer": optimizer, "select": "last", **keys}
    run = run_stage("train", run, stage_of("train").config.model_validate(whole))
    return {"accuracy": 100 * evaluate(run.model, bundle.test, bundle.task)["accuracy"], "passes": float(run.passes)}


def rows_of(setting: str, seeds: Sequence[int], epochs: int, store: _common.Kept) -> list[dict[str, Any]]:
    """Every row of a setting with its gain over what it is compared with."""

    def cell(name: str, keys: dict[str, Any], seed: int) -> dict[str, float]:
        make: Callable[[], dict[str, float]] = lambda: trained(setting, keys, seed, epochs)  # noqa: E731
        return store.get(f"{setting}/{name}/{epochs}/{seed}", make)

    found = {name: [cell(name, keys, s) for s in seeds] for name, (keys, _) in ROWS[setting].items()}
    rows = []
    for name, (_, against) in ROWS[setting].items():
        gains = [a["accuracy"] - b["accuracy"] for a, b in zip(found[name], found[against or name])]
        rows.append({
            "setting": setting, "method": name, "passes": round(statistics.mean(c["passes"] for c in found[name])),
            "accuracy": round(statistics.mean(c["accuracy"] for c in found[name]), 2), "against": against or "-",
            "gain": round(statistics.mean(gains), 2) if against else None,
            "standard error": round(statistics.stdev(gains) / len(gains) ** 0.5, 2) if against and gains[1:] else None,
        })  # fmt: skip
    return rows


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The targets that are not met, as sentences."""
    row = next(r for r in rows if r["setting"] == "long tail" and r["method"] == "sam, drw")
    return [] if row["gain"] > 0 else [f"on the long tail SAM with deferred weights gains {row['gain']:.2f} over SGD"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not there yet, print, write; the exit code."""
    options = _common.arguments(__doc__, argv, _common.resumable)
    torch.set_num_threads(1)
    seeds, epochs = ((0,), 6) if options.quick else ((0, 1, 2), EPOCHS)
    store = _common.kept(NAME, options)
    rows = [row for setting in ROWS for row in rows_of(setting, seeds, epochs, store)]
    return _common.finish(NAME, rows, missed(rows), options)


if __name__ == "__main__":
    sys.exit(main())
