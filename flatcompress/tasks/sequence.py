"""One class a step: logits [B, classes, T] as torch's cross-entropy takes them (or [B, T, classes]), classes [B, T]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flatcompress.errors import unknown
from flatcompress.tasks import metrics
from flatcompress.tasks.classification import given, weighted
from flatcompress.tasks.losses import CrossEntropy, check_focal, check_weights
from flatcompress.tasks.outputs import class_map
from flatcompress.tasks.segmentation import check_index, counted_classes
from flatcompress.tasks.targets import class_maps
from flatcompress.tasks.task import Task

AXES = {"channels": 1, "last": -1}


def sequence(
    axis: str = "channels",
    ignore_index: Any = None,
    class_weights: Any = None,
    focal: float = 0.0,
    select: str = "accuracy",
) -> Task:
    """``axis``: where the classes are, channels ([B, classes, T]) or last. ``select``: step accuracy or macro_f1."""
    if axis not in AXES:
        raise unknown("axis of task sequence", axis, AXES)
    where, ignore = AXES[axis], check_index("sequence", ignore_index)
    loss = CrossEntropy(focal=check_focal("sequence", focal), ignore=ignore, last=axis == "last")
    weights = check_weights("sequence", class_weights)
    table = {
        "accuracy": metrics.accuracy(where, ignore),
        "macro_f1": metrics.confusion(None, where, metrics.macro_f1, ignore),
    }
    if select not in table:
        raise unknown("metric of task sequence", select, table)

    def output(found: Tensor, y: Tensor, names: Sequence[str]) -> str | None:
        problem = class_map(found.movedim(-1, 1) if axis == "last" and found.ndim == 3 else found, y, names)
        other = "last" if axis == "channels" else "channels"
        return problem and f"{problem} With the classes on the other axis: task: {{name: sequence, axis: {other}}}."

    return Task(
        loss,
        {name: table[name] for name in dict.fromkeys([select, *table])},
        "sequence",
        class_maps(1, "sequence", ignore),
        names=lambda steps: counted_classes(steps, ignore),
        output=output,
        agreement="argmax_channels" if axis == "channels" else "argmax",
        target=lambda x, y: y.long(),
        smoothed=loss.smoothed,
        summed=loss.summed,
        fitted=lambda task, steps, classes: weighted(task, loss, weights, steps, classes),
        of_classes=True,
        options=given(ignore_index=ignore_index, class_weights=class_weights, focal=focal, select=select,
                      **({} if axis == "channels" else {"axis": axis})),
    )  # fmt: skip
