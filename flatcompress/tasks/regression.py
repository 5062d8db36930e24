"""Numbers: outputs [B, K] (or maps [B, ...]) and float targets of the same shape."""

from __future__ import annotations

import torch.nn.functional as F

from flatcompress.errors import unknown
from flatcompress.tasks import metrics
from flatcompress.tasks.outputs import same_shape
from flatcompress.tasks.targets import numbers
from flatcompress.tasks.task import Loss, Task

LOSSES: dict[str, Loss] = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}


def regression(loss: str = "mse", select: str = "mae") -> Task:
    """``loss``: mse, l1 or smooth_l1. ``select``: mae, rmse or r2."""
    if loss not in LOSSES:
        raise unknown("loss of task regression", loss, LOSSES)
    table = {"mae": metrics.mean_error(1), "rmse": metrics.mean_error(2, root=True), "r2": metrics.r2()}
    if select not in table:
        raise unknown("metric of task regression", select, table)
    names = list(dict.fromkeys([select, *table]))
    options = {"loss": loss} if loss != "mse" else {}
    return Task(
        lambda output, y: LOSSES[loss](output, y.reshape(output.shape)),
        {name: table[name] for name in names},
        "regression",
        numbers,
        output=same_shape,
        options={**options, **({"select": select} if select != "mae" else {})},
    )
