"""Several labels a sample: logits [B, labels], zeros and ones [B, labels]; a logit above 0 means present."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flatcompress.errors import unknown
from flatcompress.tasks import metrics
from flatcompress.tasks.classification import given
from flatcompress.tasks.losses import BALANCED, BinaryCrossEntropy, check_focal, check_weights
from flatcompress.tasks.losses import class_weights as read_weights
from flatcompress.tasks.outputs import logits
from flatcompress.tasks.targets import labels
from flatcompress.tasks.task import Task

_MOST = 100.0  # no label counts more often than this


def multilabel(class_weights: Any = None, focal: float = 0.0, select: str = "macro_f1") -> Task:
    """``class_weights``: what a present label counts, or balanced. ``focal``: gamma. ``select``: a metric."""
    table = {"macro_f1": metrics.label_f1(), "mean_average_precision": metrics.average_precision()}
    if select not in table:
        raise unknown("metric of task multilabel", select, table)
    loss = BinaryCrossEntropy(focal=check_focal("multilabel", focal))
    weights = check_weights("multilabel", class_weights)

    def fitted(task: Task, targets: Tensor, names: Any) -> Task:
        if weights is None:
            return task
        heavy = BinaryCrossEntropy(_weights(weights, targets, names), loss.focal)
        return task.changed(loss=heavy, smoothed=heavy.smoothed)

    return Task(
        loss,
        {name: table[name] for name in dict.fromkeys([select, *table])},
        "multilabel",
        labels,
        output=logits,
        agreement="threshold",
        smoothed=loss.smoothed,
        fitted=fitted,
        options=given(class_weights=class_weights, focal=focal, **({} if select == "macro_f1" else {"select": select})),
    )


def _weights(weights: Any, targets: Tensor, names: Any) -> Tensor | None:
    present = targets.sum(0)
    if weights == BALANCED:
        return ((len(targets) - present) / present.clamp(min=1)).clamp(1 / _MOST, _MOST)
    return read_weights("multilabel", weights, present, names)
