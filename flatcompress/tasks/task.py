"""What is learned, as one object: loss, metrics, targets, what an output looks like, how two outputs are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flatcompress.errors import UserError, unknown
from flatcompress.tasks.agreement import AGREEMENTS
from flatcompress.tasks.metrics import Metric, as_metric
from flatcompress.tasks.outputs import logits
from flatcompress.tasks.targets import any_targets

Loss = Callable[[Tensor, Tensor], Tensor]  # (output, y) -> mean over the batch, a scalar
Targets = Callable[[Any, str], Tensor]  # (what the user gave, name of the part) -> [N, ...]
LOSS = "loss"  # what selects where no metric has a direction


def _any_output(output: Tensor, y: Tensor, names: Sequence[str]) -> str | None:
    return None


def _as_stored(x: Tensor, y: Tensor) -> Tensor:
    return y


def _fit_together(inputs: tuple[int, ...], targets: tuple[int, ...]) -> str | None:
    return None


def _as_it_is(task: Task, targets: Tensor, names: Sequence[str]) -> Task:
    return task


def _numbered(targets: Tensor) -> tuple[str, ...]:
    """One name a column."""
    return tuple(str(i) for i in range(targets[0].numel() if len(targets) else 1))


@dataclass(frozen=True)
class Task:
    """A learning problem. ``Task(loss=..., metrics={...})`` is enough for one of your own.

    loss: ``loss(output, y)`` -> mean over the batch. metrics: name -> `Metric`, a torchmetrics object, a function of
        all outputs and targets [N, ...], or (function, "higher" | "lower"). The first one with a direction selects the
        epoch; without any the loss on the validation split does.
    targets: ``targets(given, part)`` -> [N, ...]; UserError for targets of another kind.
    names: what the outputs stand for where the user named nothing: classes, labels, columns.
    output: ``output(output, y, names)`` -> what is wrong with the shape of a model's output, or None.
    agreement: row of `tasks.agreement.AGREEMENTS`: how the certificate compares two outputs.
    target: ``target(x, y)`` -> the target of a batch, where it depends on the input.
    smoothed: ``smoothed(share)`` -> the loss with label smoothing; None: the task has none.
    summed: ``loss`` summed over the batch, where that is not the mean times its size.
    fitted: ``fitted(task, targets, names)`` -> the task for these training targets (class weights).
    fits: ``fits(input shape, target shape)`` of one sample -> what is wrong with the two together, or None.
    of_classes: are targets class numbers that must all be seen in training?
    occurring: ``occurring(targets)`` -> the class numbers in them, where that is not what they hold.
    ragged: has a sample any number of targets [N, M, ...], so that parts may differ in M?
    moved: ``moved(targets, theta)`` -> the targets of images that augmentation sampled at theta [B, 2, 3], see
        `torch.nn.functional.affine_grid`; None: targets stay what they are.
    drawn: ``drawn(picture, output, y, names)`` -> a sample for the report: a PIL image, what the network gave for it,
        its target.
    decode: what the device runner must know beside ``agreement``, as plain data. options: keys it was built with.
    """

    loss: Loss
    metrics: Mapping[str, Any] = field(default_factory=dict)
    name: str = "own"
    targets: Targets = any_targets
    names: Callable[[Tensor], tuple[str, ...]] = _numbered
    output: Callable[[Tensor, Tensor, Sequence[str]], str | None] = _any_output
    agreement: str = "values"
    target: Callable[[Tensor, Tensor], Tensor] = _as_stored
    smoothed: Callable[[float], Loss] | None = None
    summed: Loss | None = None
    fitted: Callable[[Task, Tensor, Sequence[str]], Task] = _as_it_is
    fits: Callable[[tuple[int, ...], tuple[int, ...]], str | None] = _fit_together
    of_classes: bool = False
    occurring: Callable[[Tensor], set[int]] | None = None
    ragged: bool = False
    moved: Callable[[Tensor, Tensor], Tensor] | None = None
    drawn: Callable[[Any, Tensor, Tensor, Sequence[str]], Any] | None = None
    decode: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise UserError(f"task {self.name!r}: loss is a function of (output, y), found {type(self.loss).__name__}.")
        if self.agreement not in AGREEMENTS:
            raise unknown("agreement of outputs", self.agreement, AGREEMENTS)
        if not isinstance(self.metrics, Mapping):
            raise UserError(f"task {self.name!r}: metrics maps names to functions, found {self.metrics!r}.")
        object.__setattr__(self, "metrics", {str(k): as_metric(str(k), m) for k, m in self.metrics.items()})

    @property
    def selects(self) -> str:
        """Name of the metric that selects, or ``loss``."""
        return next((name for name, metric in self.metrics.items() if metric.higher is not None), LOSS)

    @property
    def metric(self) -> Metric:
        """The metric that selects; the loss where that does."""
        return self.metrics[self.selects] if self.selects in self.metrics else Metric(self._loss_rows, _mean, False)

    @property
    def reported(self) -> dict[str, Metric]:
        """Every metric, the loss among them where it selects."""
        own = {} if self.selects in self.metrics else {LOSS: self.metric}
        return {**self.metrics, **own}

    @property
    def plain(self) -> bool:
        """Is accuracy all there is to report? Then its rows are what they were before there were other tasks."""
        return list(self.reported) == ["accuracy"]

    @property
    def of_vectors(self) -> bool:
        """Is an output one vector a sample, with an entry for every name?"""
        return self.output is logits

    def better(self, value: float, best: float) -> bool:
        """Is ``value`` of the selecting metric at least as good as ``best``?"""
        return value >= best if self.metric.higher else value <= best

    def training_loss(self, label_smoothing: float = 0.0) -> Loss:
        """The loss that is minimised. UserError where the task has no label smoothing."""
        if not label_smoothing:
            return self.loss
        if self.smoothed is None:
            raise UserError(
                f"label_smoothing belongs to tasks with classes; task {self.name!r} has none: leave it out."
            )
        return self.smoothed(label_smoothing)

    def summed_loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The loss summed over the batch."""
        return self.loss(output, y) * len(y) if self.summed is None else self.summed(output, y)

    def measure(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Every reported metric of (output, y) batches; NaN where it is not defined on them."""
        rows: dict[str, list[Tensor]] = {name: [] for name in self.reported}
        with torch.no_grad():
            for output, y in pairs:
                for name, metric in self.reported.items():
                    rows[name].append(metric.rows(output.detach(), y).double().cpu())
        return {name: metric.finish(torch.cat(rows[name])) for name, metric in self.reported.items()}

    def logged(self, train: float, validation: float) -> dict[str, Any]:
        """The fields of an epoch's event: accuracy under its old names, everything else under the metric's."""
        if self.selects == "accuracy":
            return {"accuracy": train, "val_accuracy": validation}
        named = {"metric": self.selects, "higher": bool(self.metric.higher), "share": self.metric.share}
        return {"accuracy": None, "val_accuracy": None, **named, "score": train, "val_score": validation}

    def selected(self, value: float) -> dict[str, Any]:
        """The fields of the event that says what an epoch was selected by."""
        return {k: v for k, v in self.logged(value, value).items() if k not in ("accuracy", "score")}

    def fit(self, targets: Tensor, names: Sequence[str]) -> Task:
        """This task for these training targets."""
        return self.fitted(self, targets, names)

    def described(self) -> dict[str, Any]:
        """Name and keys as a recipe has them, and how its outputs are read: for certificates and device runners."""
        return {"name": self.name, "output": self.agreement, **self.decode, **self.options}

    def changed(self, **fields: Any) -> Task:
        """A copy with other fields."""
        return replace(self, **fields)

    def _loss_rows(self, output: Tensor, y: Tensor) -> Tensor:
        return torch.stack([self.loss(output[i : i + 1], y[i : i + 1]).detach().reshape(1) for i in range(len(y))])


def _mean(rows: Tensor) -> float:
    return float(rows.sum()) / len(rows) if len(rows) else math.nan
