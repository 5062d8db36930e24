"""One class a sample: logits [B, classes], class numbers [B]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flatcompress.errors import unknown
from flatcompress.tasks import metrics
from flatcompress.tasks.losses import CrossEntropy, check_focal, check_weights, class_weights
from flatcompress.tasks.outputs import logits
from flatcompress.tasks.targets import class_numbers
from flatcompress.tasks.task import Task

METRICS = {
    "accuracy": lambda: metrics.accuracy(),
    "balanced_accuracy": lambda: metrics.confusion(None, 1, metrics.balanced_accuracy),
    "macro_f1": lambda: metrics.confusion(None, 1, metrics.macro_f1),
}


def classification(class_weights: Any = None, focal: float = 0.0, select: str = "accuracy") -> Task:
    """``class_weights``: balanced, numbers, or numbers by name. ``focal``: gamma. ``select``: a metric of `METRICS`."""
    if select not in METRICS:
        raise unknown("metric of task classification", select, METRICS)
    loss = CrossEntropy(focal=check_focal("classification", focal))
    weights = check_weights("classification", class_weights)
    names = list(dict.fromkeys([select, "accuracy"]))
    return Task(
        loss,
        {name: METRICS[name]() for name in names},
        "classification",
        class_numbers,
        names=lambda targets: tuple(str(c) for c in range(1 + int(targets.max()) if len(targets) else 0)),
        output=logits,
        agreement="argmax",
        smoothed=loss.smoothed,
        summed=loss.summed,
        fitted=lambda task, targets, classes: weighted(task, loss, weights, targets, classes),
        of_classes=True,
        options=given(class_weights=class_weights, focal=focal, select=select),
    )


def weighted(task: Task, loss: CrossEntropy, weights: Any, targets: Tensor, classes: Sequence[str]) -> Task:
    """``task`` with the weights of its classes, counted in ``targets`` where they are balanced."""
    if weights is None:
        return task
    counted = targets.flatten().long()
    counted = counted[(counted >= 0) & (counted < len(classes))]
    counts = torch.bincount(counted, minlength=len(classes))
    heavy = CrossEntropy(
        class_weights(task.name, weights, counts, classes), loss.focal, loss.ignore, loss.smoothing, loss.last
    )
    return task.changed(loss=heavy, smoothed=heavy.smoothed, summed=heavy.summed)


def given(**options: Any) -> dict[str, Any]:
    """The keys that are not at their usual value."""
    usual = {"class_weights": None, "focal": 0.0, "select": "accuracy", "ignore_index": None, "classes": None}
    return {key: value for key, value in options.items() if value != usual.get(key)}
