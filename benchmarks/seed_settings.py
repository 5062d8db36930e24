"""Methods that change the data, the loss or the setting, each against its plain counterpart at equal passes, 3 seeds.

    python -m benchmarks.seed_settings [--quick] [--check]

On handwritten digits (scikit-learn's) and a small convolutional network. *useful*: 600 of them; USEFUL's separating
epochs count, so its second training is shorter. *long tail*: the first digit has 50 times the samples of the last
(arXiv 2212.13827's setting, made small); the test part is not thinned. *apart*: six clients in a ring hold two or three
digits each; accuracy is the mean over the clients' networks. *masks*: 90 % of the weights masked at once or gradually
(arXiv 2004.14765). *regimes*: a dense network trained briefly or long, masked, and retrained twice with other batches
(arXiv 2305.18383): the way between the two (lmc) and how alike they are (cka), from which the regime follows.
*unlearning*: a network that knows all digits forgets the sevens and keeps the others; *more* says how many sevens it
knows then, and after five steps on ten of them (arXiv 2502.05374).

*passes* are forward and backward passes; the rows of a setting have as many (but *regimes*, where their number is what
varies), a method of two passes a step taking half the epochs. *against* is the row that a gain is over. Cells that are
done are kept in benchmarks/results/seed_settings.partial.

Targets (``--check`` exits 1 where one is missed): on the long tail SAM with deferred weights above SGD without.
"""

from __future__ import annotations

import copy
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _common
from benchmarks.seed_methods import network
from flatcompress import data, flat
from flatcompress.plan import Plan
from flatcompress.stages import RunContext, run_stage, stage_of
from flatcompress.stages.measure import sharpness, train_batches
from flatcompress.training.batches import evaluate
from flatcompress.training.devices import seed_everything
from flatcompress.training.loop import make_accelerator

NAME = "seed_settings"
EPOCHS = {
    "long tail": 40,
    "masks": 16,
    "useful": 16,
    "apart": 12,
    "unlearning": 16,
    "regimes": 12,
}  # of one pass a step
BATCH = 50
OPTIMIZER = {"name": "sgd", "lr": 0.1, "weight_decay": 5e-4, "nesterov": False}
CLIENTS, LOCAL = 6, 5
DRW = {"name": "drw", "beta": 0.99}
Found = dict[str, float]
# setting -> row -> (what is different, the row it is compared with)
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
        "sam, drw": ({"method": "sam", "emphasis": DRW}, "sgd"),
        "sam, drw, late_rho 0.2": ({"method": "sam", "emphasis": {**DRW, "late_rho": 0.2}}, "sam, drw"),
    },
    "apart": {
        "dfedavg": ({"method": "none", "steps": 1}, ""),
        "dfedsam": ({"method": "sam", "steps": 1}, "dfedavg"),
        "dfedavg, 4 averages": ({"method": "none", "steps": 4}, "dfedavg"),
        "dfedsam-mgs": ({"method": "sam", "steps": 4}, "dfedavg, 4 averages"),
    },
    "masks": {
        "one_shot": ({"removal": "one_shot"}, ""),
        "gradual": ({"removal": "cubic"}, "one_shot"),
    },
    "unlearning": {
        "plain": ({"rho": 0.0}, ""),
        "unlearn, rho 0.01": ({"rho": 0.01}, "plain"),
        "unlearn, rho 0.1": ({"rho": 0.1}, "plain"),
    },
    "regimes": {
        "brief, 80 %": ({"dense": 0.25, "sparsity": 0.8}, ""),
        "long, 80 %": ({"dense": 2.0, "sparsity": 0.8}, "brief, 80 %"),
        "brief, 97 %": ({"dense": 0.25, "sparsity": 0.97}, ""),
        "long, 97 %": ({"dense": 2.0, "sparsity": 0.97}, "brief, 97 %"),
    },
}


def digits(setting: str, seed: int) -> data.DataBundle:
    """The digits of a setting, split by the seed."""
    tail: dict[str, Any] = {"long_tail": 50, "test_fraction": 0.3}
    chosen = tail if setting == "long tail" else {"test_fraction": 0.62}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return data.load("rotated-digits", seed=seed, domains=["0"], size=8, corruptions="none", **chosen)


def begin(setting: str, seed: int, model: nn.Module | None = None) -> RunContext:
    """A run on the digits of a setting."""
    seed_everything(seed)
    made = network() if model is None else model
    bundle = digits(setting, seed)
    return RunContext(made, Plan(), bundle, network, make_accelerator("cpu"), batch_size=BATCH, seed=seed)


def stage(kind: str, run: RunContext, **keys: Any) -> RunContext:
    """``run`` after a stage."""
    whole = {"optimizer": OPTIMIZER, "select": "last", **keys}
    return run_stage(kind, run, stage_of(kind).config.model_validate(whole))


def score(run: RunContext, **more: float) -> Found:
    """Test accuracy in percent, passes, and what else was found."""
    accuracy = evaluate(run.model, run.data.test, run.data.task)["accuracy"]
    return {"accuracy": 100 * accuracy, "passes": float(run.passes), **more}


def emphasized(setting: str, keys: dict[str, Any], seed: int, epochs: int) -> Found:
    """A train stage of as many passes as ``epochs`` of one pass a step have."""
    run = begin(setting, seed)
    steps = run.steps_per_epoch * epochs // (1 if keys["method"] == "none" else 2)
    if keys.get("emphasis") == "useful":
        steps -= run.steps_per_epoch * max(1, round(0.08 * epochs))
    return score(stage("train", run, epochs=epochs, max_steps=steps, **keys))


def apart(setting: str, keys: dict[str, Any], seed: int, epochs: int) -> Found:
    """Clients with two or three digits each, who average after every five steps."""
    run = begin(setting, seed)
    x, y = (torch.cat(part) for part in zip(*train_batches(run, len(run.data.train.labels))))
    shards = y.argsort(stable=True).chunk(CLIENTS)
    models = [copy.deepcopy(run.model) for _ in shards]
    bases = [torch.optim.SGD(m.parameters(), lr=0.05, weight_decay=5e-4) for m in models]
    clients = [flat.create(keys["method"], m, base, seed=seed) for m, base in zip(models, bases)]
    federation = flat.federated.dfedsam(models, clients, "ring", keys["steps"])
    rng = torch.Generator().manual_seed(seed)
    rounds = run.steps_per_epoch * epochs // (LOCAL * (1 if keys["method"] == "none" else 2))
    for _ in range(rounds):
        drawn = [[s[torch.randint(0, len(s), (BATCH,), generator=rng)] for _ in range(LOCAL)] for s in shards]
        federation.round([[closure(m, x[r], y[r]) for r in rows] for m, rows in zip(models, drawn)])
    run.passes = sum(client.passes for client in clients)
    own = [100 * evaluate(m, run.data.test, run.data.task)["accuracy"] for m in models]
    return {"accuracy": statistics.mean(own), "passes": float(run.passes), "apart": federation.disagreement}


def closure(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    """Forward and backward over one batch."""

    def run() -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return run


def unlearning(setting: str, keys: dict[str, Any], seed: int, epochs: int) -> Found:
    """Forget the sevens by NPO, then relearn them from ten; accuracy is that of the other digits."""
    run = stage("train", begin(setting, seed), method="none", epochs=epochs)
    x, y = (torch.cat(part) for part in zip(*train_batches(run, len(run.data.train.labels))))
    test_x, test_y = run.data.test.__getitems__(list(range(len(run.data.test))))
    model = run.model.eval()  # running statistics stay
    known, gone = copy.deepcopy(model), (y == 7).nonzero().flatten()
    kept = (y != 7).nonzero().flatten()
    base = torch.optim.SGD(model.parameters(), lr=0.02)
    optimizer = flat.create("unlearn", model, base, rho=keys["rho"])
    rng = torch.Generator().manual_seed(seed)

    def losses(net: nn.Module, rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(net(x[rows]), y[rows], reduction="none")

    def forget(rows: Tensor) -> Any:
        def run() -> Tensor:
            with torch.no_grad():
                before = losses(known, rows)
            loss = flat.terms.npo(losses(model, rows), before, beta=1.0)
            loss.backward()
            return loss

        return run

    def right(of: Tensor) -> float:
        with torch.no_grad():
            return 100 * float((model(test_x[of]).argmax(1) == test_y[of]).double().mean())

    for _ in range(60 if keys["rho"] else 90):  # a step takes three passes, or two without a radius
        first = gone[torch.randint(0, len(gone), (BATCH,), generator=rng)]
        second = kept[torch.randint(0, len(kept), (BATCH,), generator=rng)]
        optimizer.step(forget(first), closure(model, x[second], y[second]))
    others, sevens = right(test_y != 7), right(test_y == 7)
    again = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(5):
        again.zero_grad()
        losses(model, gone[:10]).mean().backward()
        again.step()
    return {"accuracy": others, "passes": 180.0, "sevens": sevens, "relearned": right(test_y == 7)}


def masks(setting: str, keys: dict[str, Any], seed: int, epochs: int) -> Found:
    """Masked at once or gradually in as many epochs, with PSP-entropy and sharpness of what comes out."""
    run = stage("train", begin(setting, seed), method="none", epochs=epochs // 2)
    run = stage("sparsify", run, method="none", epochs=epochs - epochs // 2, sparsity=0.9, **keys)
    entropies = flat.entropy.psp_entropy(run.model, train_batches(run, 600), len(run.data.classes))
    return score(run, entropy=statistics.mean(entropies.values()), sharpness=sharpness(run, 600))


def regimes(setting: str, keys: dict[str, Any], seed: int, epochs: int) -> Found:
    """Two retrainings of one masked network: the way between them and how alike they are."""
    dense = stage("train", begin(setting, seed), method="none", epochs=max(1, round(keys["dense"] * epochs)))
    ends = []
    for other in (1, 2):
        run = begin(setting, seed, copy.deepcopy(dense.model))
        run.seed = 1000 * seed + other
        removal = {"removal": "one_shot", "warmup_share": 0.0, "prune_share": 0.01}
        ends.append(stage("sparsify", run, method="none", epochs=epochs // 2, sparsity=keys["sparsity"], **removal))
    found = flat.connectivity.regime(ends[0].model, ends[1].model, train_batches(ends[0], 600))
    accuracy = statistics.mean(score(end)["accuracy"] for end in ends)
    return {
        "accuracy": accuracy, "passes": float(dense.passes + ends[0].passes), "lmc": found.lmc, "cka": found.similarity,
    }  # fmt: skip


MEASURED = {
    "useful": emphasized, "long tail": emphasized, "apart": apart, "masks": masks, "unlearning": unlearning,
    "regimes": regimes,
}  # fmt: skip


def rows_of(setting: str, seeds: Sequence[int], epochs: int, store: _common.Kept) -> list[dict[str, Any]]:
    """Every row of a setting with its gain over what it is compared with."""
    measure = partial(MEASURED[setting], setting)
    return compared(setting, ROWS[setting], measure, seeds, epochs, store)


def compared(
    setting: str, named: Mapping[str, Any], measure: Callable[..., Found], seeds: Sequence[int], size: float,
    store: _common.Kept, quality: str = "accuracy", digits: int = 3,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows ``named`` {name: (keys, name of what it is compared with)}, each ``measure(keys, seed, size)`` by seed.

    quality: what the gain is of; digits: of whatever else is told.
    """
    found: dict[str, list[Found]] = {name: [] for name in named}
    for name, (keys, _) in named.items():
        for seed in seeds:
            found[name].append(store.get(f"{setting}/{name}/{size}/{seed}", partial(measure, keys, seed, size)))
    rows = []
    for name, (_, against) in named.items():
        gains = [a[quality] - b[quality] for a, b in zip(found[name], found[against or name])]
        means = {key: statistics.mean(c[key] for c in found[name]) for key in found[name][0]}
        rows.append({
            "setting": setting, "method": name, "passes": round(means.pop("passes")),
            quality: round(means.pop(quality), 2), "against": against or "-",
            "gain": round(statistics.mean(gains), 2) if against else None,
            "standard error": round(statistics.stdev(gains) / len(gains) ** 0.5, 2) if against and gains[1:] else None,
            "more": ", ".join(f"{key} {value:.{digits}g}" for key, value in means.items()),
        })  # fmt: skip
    return rows


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The targets that are not met, as sentences."""
    row = next(r for r in rows if r["setting"] == "long tail" and r["method"] == "sam, drw")
    return [] if row["gain"] > 0 else [f"on the long tail SAM with deferred weights gains {row['gain']:.2f} over SGD"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not there yet, print, write; the exit code."""
    options = _common.arguments(__doc__, argv, _common.resumable)
    seeds = (0,) if options.quick else (0, 1, 2)
    store = _common.kept(NAME, options)
    rows = [
        row for setting in EPOCHS for row in rows_of(setting, seeds, 4 if options.quick else EPOCHS[setting], store)
    ]
    return _common.finish(NAME, rows, missed(rows), options)


if __name__ == "__main__":
    sys.exit(main())
