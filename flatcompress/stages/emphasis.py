"""Which training samples count more: the slowly learned ones come twice, rare classes weigh more late in training.

Equation and algorithm numbers of the papers are not given here: their full texts were not at hand.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from flatcompress.data import resampled
from flatcompress.errors import UserError, unknown
from flatcompress.modules import evaluating
from flatcompress.randomness import capture, restore
from flatcompress.registry import Registry
from flatcompress.stages.context import RunContext
from flatcompress.stages.job import divided, make_job, train
from flatcompress.stages.keys import KeyProblem, TrainingKeys, coerce, flat_hyper
from flatcompress.tasks.losses import CrossEntropy
from flatcompress.training.batches import in_order
from flatcompress.training.callback import Callback, Training


@dataclass(frozen=True)
class Useful:
    """USEFUL (arXiv 2404.17768): what is learned slowly is seen more often, from the start.

    The model trains for ``separating`` of its epochs, at least one. The samples of each class are then parted in two by
    k-means on the network's outputs; the cluster of the higher mean loss comes ``upsample`` times an epoch, and
    training starts anew from the weights that the stage began with. upsample 1 is training without it, bit for bit.
    """

    separating: float = 0.08
    upsample: int = 2

    def __post_init__(self) -> None:
        _within("separating", self.separating, 0 < self.separating < 1, "a share of the epochs between 0 and 1")
        _within("upsample", self.upsample, 1 <= self.upsample <= 100, "a whole number from 1 (off) to 100")


@dataclass(frozen=True)
class ClassBalanced:
    """Class weights by the effective number of samples, E_n = (1 - beta^n) / (1 - beta) (arXiv 1901.05555, eq. 2).

    A class with n training samples weighs 1 / E_n; the weights' mean is 1. They count from ``defer`` of the epochs on
    (deferred re-weighting, arXiv 1906.07413, algorithm 1), which is when the radius of the flat method becomes
    ``late_rho``, where it is given: SAM with a larger radius once rare classes weigh, so that it escapes their saddle
    points (arXiv 2212.13827). beta 0 weighs all alike: training without it, bit for bit.
    """

    beta: float = 0.9999
    defer: float = 0.0
    late_rho: float | None = None

    def __post_init__(self) -> None:
        _within("beta", self.beta, 0 <= self.beta < 1, "a number from 0 (off) to below 1")
        _within("defer", self.defer, 0 <= self.defer < 1, "a share of the epochs from 0 to below 1")
        if self.late_rho is not None:
            _within("late_rho", self.late_rho, 0 <= self.late_rho < math.inf, "a radius of at least 0")


def deferred(beta: float = 0.9999, defer: float = 0.8, late_rho: float | None = None) -> ClassBalanced:
    """`ClassBalanced` from four fifths of the epochs on."""
    return ClassBalanced(beta, defer, late_rho)


def _within(key: str, value: Any, fits: bool, allowed: str) -> None:
    if not fits:
        raise UserError(f"{key} is {allowed}, found {value!r}.")


Row = Useful | ClassBalanced


EMPHASES = Registry("emphasis")
EMPHASES.add("useful", Useful, "what is learned slowly is seen twice an epoch, and training starts anew", "2404.17768")
EMPHASES.add("reweight", ClassBalanced, "classes weigh by their effective number of samples", "1901.05555")
EMPHASES.add("drw", deferred, "class weights late in training, and a larger radius with them", "2212.13827")


def read(value: Any) -> dict[str, Any] | None:
    """A recipe's ``emphasis``, a name or a mapping with it, as a mapping. KeyProblem for what no row takes."""
    if value is None or value == "none":
        return None
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise KeyProblem("emphasis", f"is a name, or a mapping with one: {{name: useful}}; found {value!r}.")
    try:
        entry = EMPHASES[given["name"]]
        keys = {key: part for key, part in given.items() if key != "name"}
        strange = next((key for key in keys if key not in entry.defaults), None)
        if strange is not None:
            raise unknown(f"key of emphasis {entry.name}", strange, entry.defaults)
        usual = {key: 0.0 if value is None else value for key, value in entry.defaults.items()}
        keys = {key: None if part is None else coerce(key, part, usual[key]) for key, part in keys.items()}
        entry(**keys)
    except UserError as error:
        raise KeyProblem("emphasis", str(error)) from None
    return {"name": entry.name, **keys}


def row_of(given: dict[str, Any]) -> Row:
    """The row that `read` found."""
    return cast(Row, EMPHASES[given["name"]](**{key: value for key, value in given.items() if key != "name"}))


def check_task(run: RunContext, row: Row) -> None:
    """UserError where the task has no classes to look at, or weights of its own."""
    task = run.task
    if not task.of_classes or not task.of_vectors:
        raise UserError(f"emphasis needs one class a sample; task {task.name!r} has none: leave it out.")
    if isinstance(row, ClassBalanced):
        if not isinstance(task.loss, CrossEntropy):
            raise UserError("emphasis weighs classes in a cross-entropy, and the task has a loss of its own.")
        if task.loss.weight is not None:
            raise UserError("emphasis weighs classes, and so do the task's class_weights: leave one of them out.")


# --------------------------------------------------------------------- samples


def slow_samples(outputs: Tensor, losses: Tensor, labels: Tensor, seed: int = 0) -> list[int]:
    """Positions of the slowly learned samples: of each class the one of two clusters whose mean loss is higher.

    outputs: [N, classes] logits; losses, labels: [N]. A class whose outputs are all alike has none.

    >>> outputs = torch.tensor([[4.0, 0.0], [4.1, 0.0], [0.5, 0.0], [0.0, 3.0]])
    >>> slow_samples(outputs, torch.tensor([0.1, 0.1, 0.9, 0.2]), torch.tensor([0, 0, 0, 1]))
    [2]
    """
    from sklearn.cluster import KMeans  # not at the top: it takes half a second to load, and few recipes need it
    from threadpoolctl import threadpool_limits

    found: list[int] = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        points = outputs[members].double().numpy()
        if (points == points[:1]).all():
            continue
        with threadpool_limits(1):  # sums in one order: the same clusters on every machine
            parts = KMeans(2, n_init=10, random_state=seed).fit_predict(points)
        inside = torch.as_tensor(parts) == 1
        mean = losses[members].double()
        slower = inside if mean[inside].mean() > mean[~inside].mean() else ~inside
        found += members[slower].tolist()
    return sorted(found)


def separate(run: RunContext, config: TrainingKeys, row: Useful, callbacks: list[Callback]) -> list[int]:
    """Train for the first epochs, find the slow samples, and put weights and random numbers back."""
    begun = {name: value.clone() for name, value in run.model.state_dict().items()}
    drawn = capture()
    epochs = min(max(1, round(row.separating * config.epochs)), config.epochs)
    brief = config.model_copy(update={"select": "last", "patience": None})
    with divided(run):
        train(run, make_job(run, brief, callbacks, epochs=epochs))
    found = slow_samples(*_outputs(run), run.seed)
    run.emit("useful", slow=len(found), of=len(cast(Any, run.data.train)), epochs=epochs)
    run.model.load_state_dict(begun)
    restore(drawn)
    return found


@torch.no_grad()
def _outputs(run: RunContext) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, losses and labels of the training samples as they are stored, in eval mode."""
    still = copy.copy(run.data.train)
    if getattr(still, "augment", None) is not None:
        still.augment = None
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    with evaluating(run.model):
        for x, y in in_order(still, 512):
            logits = run.model(x.to(run.device)).float().cpu()
            rows.append((logits, F.cross_entropy(logits, y, reduction="none"), y))
    outputs, losses, labels = (torch.cat(column) for column in zip(*rows))
    return outputs, losses, labels


@contextmanager
def seen_more_often(run: RunContext, slow: list[int], times: int) -> Iterator[None]:
    """Inside, an epoch has the samples ``slow`` ``times`` times."""
    whole = run.data
    rows = torch.tensor([*range(len(cast(Any, whole.train))), *slow * (times - 1)])
    run.data = replace(whole, train=resampled(whole.train, rows))
    try:
        yield
    finally:
        run.data = whole


# --------------------------------------------------------------------- classes


def effective_weights(counts: Tensor, beta: float) -> Tensor:
    """[classes] (1 - beta) / (1 - beta^n), scaled so that their mean is 1; ``counts`` [classes] is n.

    >>> effective_weights(torch.tensor([2, 1]), 0.5)
    tensor([0.8000, 1.2000])
    """
    n = counts.double().clamp(min=1)
    raw = (1 - beta) / (1 - torch.tensor(beta, dtype=torch.float64) ** n)
    return (raw / raw.sum() * len(raw)).float()


class DeferredWeights(Callback):
    """Weighs classes, and changes the radius, from epoch ``begins`` on; also the job's loss."""

    def __init__(self, row: ClassBalanced, plain: CrossEntropy, counts: Tensor, begins: int) -> None:
        self.plain, self.begins, self.late_rho = plain, begins, row.late_rho
        self.weighted = replace(plain, weight=effective_weights(counts, row.beta))
        self.epoch = 0
        self._optimizer: Any = None

    def open(self, job: Training) -> None:
        """Know the optimizer whose radius changes."""
        self._optimizer = job.optimizer

    def before_epoch(self, epoch: int) -> None:
        """Begin to weigh, when it is time."""
        self.epoch = epoch
        if self.late_rho is not None and epoch >= self.begins:
            for group in self._optimizer.param_groups:
                group["rho"] = self.late_rho

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        """The loss, mean over the batch."""
        return (self.weighted if self.epoch >= self.begins else self.plain)(output, y)


def weighing(run: RunContext, config: TrainingKeys, row: ClassBalanced) -> DeferredWeights:
    """The weights of the training split's classes under ``row``. UserError for a radius that the method has not."""
    if row.late_rho is not None and "rho" not in flat_hyper(config.flat_method()):
        raise UserError(f"late_rho is the radius of a flat method; {config.flat_method()!r} has none: leave it out.")
    labels = torch.cat([y for _, y in in_order(run.data.train, 512)])
    counts = torch.bincount(labels, minlength=len(run.data.classes))
    loss = cast(CrossEntropy, run.task.training_loss(config.label_smoothing))
    return DeferredWeights(row, loss, counts, math.floor(row.defer * config.epochs))
